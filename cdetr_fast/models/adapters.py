"""`AdapterMethods`: the methods of transformers' models for adapters of PEFT."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from cdetr_fast.common.model_families import service


class AdapterMethods:
    """Mixin of the models with the methods for adapters; they need peft and transformers.

    Attributes:
        peft_config: Configuration of each adapter by name; there is none without adapters.
    """

    _hf_peft_config_loaded = False
    peft_config: dict[str, Any]

    def add_adapter(self, adapter_config: Any, adapter_name: str | None = None) -> None:
        """Add a new adapter, which then is the active one and all that trains.

        Args:
            adapter_config: A `peft.PeftConfig`, of LoRA or another kind that is put into layers.
            adapter_name: Default "default".

        Raises:
            ImportError: peft or transformers is not installed.
            TypeError: `adapter_config` is something else.
            ValueError: There is an adapter of this name, or it fits no layer.
        """
        service("adapters").add_adapter(self, adapter_config, adapter_name)

    def load_adapter(
        self,
        peft_model_id: str | None = None,
        adapter_name: str | None = None,
        peft_config: Any = None,
        adapter_state_dict: Mapping[str, Tensor] | None = None,
        is_trainable: bool = False,
        **download: Any,
    ) -> None:
        """Add an adapter with the weights that PEFT, transformers or this package has saved.

        Args:
            peft_model_id: A folder, or the id of a model on the hub.
            adapter_name: Default "default".
            peft_config: Configuration, or its fields, instead of that in the folder.
            adapter_state_dict: Weights instead of those in the folder.
            is_trainable: Leave the adapter trainable.
            **download: As PEFT takes them (`revision`, `token`, `subfolder`, ...).

        Raises:
            ImportError: peft or transformers is not installed.
            ValueError: There is an adapter of this name, or the weights are for another model.
        """
        service("adapters").load_adapter(
            self,
            peft_model_id,
            adapter_name,
            peft_config,
            adapter_state_dict,
            is_trainable,
            **download,
        )

    def set_adapter(self, adapter_name: list[str] | str) -> None:
        """Make an adapter, or several, the active ones."""
        service("adapters").set_adapter(self, adapter_name)

    def enable_adapters(self) -> None:
        """Undo `disable_adapters`."""
        service("adapters").enable_adapters(self)

    def disable_adapters(self) -> None:
        """Compute without adapters."""
        service("adapters").disable_adapters(self)

    def active_adapters(self) -> list[str]:
        """Return the names of the active adapters."""
        names: list[str] = service("adapters").active_adapters(self)
        return names

    def get_adapter_state_dict(
        self, adapter_name: str | None = None, state_dict: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Return the weights of an adapter; of the active one by default."""
        weights: dict[str, Tensor] = service("adapters").get_adapter_state_dict(
            self, adapter_name, state_dict
        )
        return weights

    def delete_adapter(self, adapter_names: list[str] | str) -> None:
        """Remove adapters from the model."""
        service("adapters").delete_adapter(self, adapter_names)
