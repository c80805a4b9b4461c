"""Which store a location has."""

from resources.storage.objects import ObjectStore
from resources.storage.stores import LocalStore, StorageError, Store, is_object_store


def open_store(root: str) -> Store:
    """Return the store of a location.

    Raises:
        StorageError: it is a URL of another kind, or the store's settings in the environment are wrong.
    """
    if "://" not in root:
        return LocalStore()
    if not is_object_store(root):
        raise StorageError(f"{root}: a lake is a path, or a URL that starts with s3://, gs:// or az://")
    return ObjectStore(root)
