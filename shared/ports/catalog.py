"""What the rest of Sluice needs of the catalogue of datasets, besides reading its tables."""

from typing import Protocol

from shared.domain.task import AccountId, LoadId


class Catalog(Protocol):
    async def revert(self, account_id: AccountId, dataset: str, load_id: LoadId) -> None:
        """Take a finished load out of its dataset and drop its rows; an export that still reads them delays the drop.

        Raises NotFound, and LockTimeout when a long query on the dataset does not end in time.
        """
        ...

    async def drop(self, account_id: AccountId, dataset: str) -> None:
        """Drop a dataset with all its loads. Raises NotFound and LockTimeout."""
        ...
