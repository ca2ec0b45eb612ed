"""Extension of `save_pretrained`: it describes a model's structured layers in config.json.

It looks for them whenever a model is saved, so the description is never out of date, however the layers came into the
model.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import wraps
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from einlinear.integrations.transformers.description import CODE, METHOD, VERSION, describe, forget

# transformers loads the config before the model, whatever the model's class
_CODE = '''"""With this, from_pretrained(..., trust_remote_code=True) loads the folder where einlinear is installed."""

import einlinear  # noqa: F401
import transformers


class {name}(transformers.{name}):
    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        return transformers.{name}.from_pretrained(*args, **kwargs)
'''


def extend_save_pretrained() -> None:
    """Let `PreTrainedModel.save_pretrained` describe structured layers; models without any are saved as before."""
    original: Any = PreTrainedModel.save_pretrained
    if original.__module__ == __name__:
        return

    @wraps(original, assigned=("__doc__", "__name__", "__qualname__"))
    def save_pretrained(
        self: PreTrainedModel,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        forget(self.config)
        # with adapters of peft, transformers saves only these
        layers = {} if getattr(self, "_hf_peft_config_loaded", False) else describe(self)
        if not layers:
            return original(self, save_directory, is_main_process, state_dict, *args, **kwargs)
        _check(self, layers)
        # without this library, transformers would keep the dense layers and draw new weights for them: an empty
        # tensor in the place of each makes it raise, as for every weight of another shape
        guards = {f"{name}.weight": torch.empty(0) for name in layers}
        state_dict = {**(self.state_dict() if state_dict is None else state_dict), **guards}
        self.config.quantization_config = {"quant_method": METHOD, "version": VERSION, "layers": layers}
        try:
            _add_code(self.config, Path(save_directory), is_main_process)
            return original(self, save_directory, is_main_process, state_dict, *args, **kwargs)
        finally:
            forget(self.config)

    PreTrainedModel.save_pretrained = save_pretrained  # type: ignore[method-assign]


def _check(model: PreTrainedModel, layers: Mapping[str, Any]) -> None:
    if int(transformers.__version__.partition(".")[0]) < 5:
        raise ImportError(f"structured layers are saved with transformers 5 or later, not {transformers.__version__}")
    if getattr(model.config, "quantization_config", None) is not None:
        raise ValueError(
            f"{next(iter(layers))} is a structured layer in a model that is quantised: config.json can describe one of "
            "the two. el.densify(model) makes the structured layers dense"
        )
    tied = model.get_expanded_tied_weights_keys(all_submodels=True)
    for name in layers:
        other = tied.get(f"{name}.weight") or next((k for k, v in tied.items() if v == f"{name}.weight"), None)
        if other:
            raise ValueError(
                f"{name} is a structured layer, but config.tie_word_embeddings would tie its weight to {other} when "
                "it is loaded: set model.config.tie_word_embeddings = False"
            )


def _add_code(config: Any, folder: Path, is_main_process: bool) -> None:
    """Write a Python file that imports this library, for processes that do not, such as lm_eval."""
    name = type(config).__name__
    if getattr(transformers, name, None) is not type(config):
        # the config has code of its own
        return
    config.auto_map = {**(getattr(config, "auto_map", None) or {}), "AutoConfig": f"{CODE}.{name}"}
    if is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{CODE}.py").write_text(_CODE.format(name=name), encoding="utf-8")
