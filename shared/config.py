"""Every setting of every service, read once from the environment by each `main.py`."""

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

MIB = 1024 * 1024
MIN_PASSWORD_CHARACTERS = 10


class Settings(BaseSettings):
    """Settings from `SLUICE_*` variables; a `_FILE`-less, flat list so that a compose file can name them all.

    An empty variable is one that is not set.
    """

    model_config = SettingsConfigDict(env_prefix="SLUICE_", extra="ignore", env_ignore_empty=True)

    # --- servers
    postgres_dsn: str = Field(description="postgresql://user:password@host:port/database")
    amqp_url: str = Field(description="amqp://user:password@host:port/vhost")
    s3_endpoint: str = Field(description="http://host:port of an S3-compatible store")
    s3_public_endpoint: str | None = Field(default=None, description="by which clients reach it; the same by default")
    s3_access_key: SecretStr
    s3_secret_key: SecretStr
    s3_bucket: str = "sluice"
    s3_region: str = "us-east-1"
    s3_checksum: Literal["md5", "crc32"] = Field(
        default="md5", description="crc32 costs less CPU; only for stores that check it, like SeaweedFS"
    )
    s3_prefix: str = Field(default="", description="put before every object key; tests use one each")

    # --- gateway
    gateway_host: str = "127.0.0.1"
    gateway_port: int = 8080
    registration_enabled: bool = True
    admin_username: str | None = None
    admin_password: SecretStr | None = Field(default=None, min_length=MIN_PASSWORD_CHARACTERS)
    max_file_bytes: PositiveInt = 1024**4
    body_idle_seconds: PositiveFloat = Field(default=60, description="a body that sends nothing for so long is cut")
    command_reply_seconds: PositiveFloat = 5.0
    password_hash_concurrency: PositiveInt = 2

    # --- tasks
    slots: PositiveInt = Field(default=2, description="tasks that one worker process runs side by side")
    lanes: PositiveInt = Field(default=3, description="batch pipelines of one task")
    batch_bytes: PositiveInt = 2 * MIB
    part_bytes: PositiveInt = Field(default=8 * MIB, description="S3 multipart part; S3 asks for 5 MiB at least")
    slice_seconds: PositiveFloat = 300.0
    lease_seconds: PositiveFloat = 10.0
    max_attempts: PositiveInt = Field(default=8, description="claims without one committed batch")
    retry_backoff_seconds: PositiveFloat = 1.0
    paused_expiry_seconds: PositiveFloat = 24 * 3600.0
    failed_expiry_seconds: PositiveFloat = 7 * 24 * 3600.0

    # --- control service
    relay_interval_seconds: PositiveFloat = 1.0
    reap_interval_seconds: PositiveFloat = 1.0
    sweep_interval_seconds: PositiveFloat = 60.0
    orphan_age_seconds: PositiveFloat = Field(default=3600.0, description="younger leftovers may still have an owner")

    # --- process
    health_port: int = Field(default=0, description="port of /healthz, /readyz, /metrics of a worker; 0: none")
    health_host: str = "127.0.0.1"
    drain_seconds: PositiveFloat = 20.0
    log_level: str = "info"
    log_format: str = Field(default="json", pattern="^(json|console)$")
