"""From what a user names to files on disk: the catalogue, `pull`, GGUF sidecars, Hugging Face folders.

Knows nothing of torch, of weights' contents, or of what the files are used for.
"""

from servd.hub.catalogue import CATALOGUE, CatalogueEntry
from servd.hub.files import ModelFiles, Progress, servd_home
from servd.hub.pull import pull
from servd.hub.resolve import resolve_model

__all__ = ["CATALOGUE", "CatalogueEntry", "ModelFiles", "Progress", "pull", "resolve_model", "servd_home"]
