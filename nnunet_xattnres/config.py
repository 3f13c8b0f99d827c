"""What a user can choose about XAttnRes."""

from dataclasses import asdict, dataclass
from typing import Any

from nnunet_xattnres.errors import XAttnResError

FUSIONS = ("replace", "residual")
BACKENDS = ("auto", "reference", "streaming", "triton")


@dataclass(frozen=True)
class XAttnResConfig:
    """Stage-level XAttnRes: which stages read from the history pool, and how what they read enters the stage.

    skip_connections: keep nnU-Net's skip connections beside the attention; without them the attention replaces them.
    read_in_encoder, read_in_decoder: where stages read from the pool.
    fusion: `"replace"` (the paper: the mixture over pool and input replaces the stage's input) or `"residual"`
        (the input plus a per-channel gate, zero at initialisation, times the mixture over the pool alone).
    backend: how the attention is computed, never what: `"auto"`, `"reference"`, `"streaming"` or `"triton"`.

    Raises `XAttnResError` for a value that does not exist.
    """

    skip_connections: bool = True
    read_in_encoder: bool = True
    read_in_decoder: bool = True
    fusion: str = "replace"
    backend: str = "auto"

    def __post_init__(self) -> None:
        for name in ("skip_connections", "read_in_encoder", "read_in_decoder"):
            if not isinstance(getattr(self, name), bool):
                raise XAttnResError(f"XAttnResConfig.{name} must be True or False, not {getattr(self, name)!r}")
        for name, choices in (("fusion", FUSIONS), ("backend", BACKENDS)):
            if getattr(self, name) not in choices:
                raise XAttnResError(
                    f"XAttnResConfig.{name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}"
                )

    @property
    def is_planned_network(self) -> bool:
        """Whether nothing is added to the network that nnU-Net planned and nothing removed from it."""
        return self.skip_connections and not self.read_in_encoder and not self.read_in_decoder

    def architecture(self) -> dict[str, Any]:
        """The fields that decide what a trained network computes, for the record in its checkpoint."""
        return {name: value for name, value in asdict(self).items() if name != "backend"}
