"""What handlers work with: everything that `main.py` has wired together."""

from collections.abc import Mapping
from dataclasses import dataclass

from gateway.accounts import Accounts
from gateway.auth import Authenticator
from gateway.datasets import Datasets
from gateway.files import Files
from gateway.metrics import Metrics
from gateway.passwords import Passwords
from gateway.task_queries import TaskQueries
from gateway.uploads import Uploads
from gateway.watch import TaskWatch
from shared.config import Settings
from shared.ports.bus import Control
from shared.ports.catalog import Catalog
from shared.ports.objects import ObjectStore
from shared.ports.tasks import TaskStore
from shared.service import Check


@dataclass(frozen=True, slots=True)
class Gateway:
    settings: Settings
    accounts: Accounts
    passwords: Passwords
    authenticator: Authenticator
    files: Files
    uploads: Uploads
    objects: ObjectStore
    tasks: TaskStore
    task_queries: TaskQueries
    watch: TaskWatch
    control: Control
    catalog: Catalog
    datasets: Datasets
    metrics: Metrics
    checks: Mapping[str, Check]
