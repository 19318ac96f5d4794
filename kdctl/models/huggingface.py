"""Any text model of the transformers library, by name or folder: `kind: huggingface:./minilm` (extra `huggingface`).

Taps are the module paths of the library's own classes, as a rule:
    bert.encoder.layer.<i>, distilbert.transformer.layer.<i>, transformer.h.<i>, ...   hidden states (N, L, D)
    bert.encoder.layer.<i>.attention.self.1      how much each token takes from each other: (N, heads, L, L); only with
                                                 `attention: eager`
    .attentions.<i>, .hidden_states.<i>          the same of any model, with output_attentions: true and attention:
                                                 eager, or with output_hidden_states: true
"""

from __future__ import annotations

import copy
import functools
import inspect
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from torch import Tensor, nn

from kdctl.errors import ConfigError, MissingError, Problem, did_you_mean
from kdctl.models.weights import read_tensors
from kdctl.torchvision_guard import ensure_torchvision

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_NOT_KEPT = {
    "_name_or_path", "transformers_version", "id2label", "label2id", "num_labels", "problem_type", "dtype",
    "torch_dtype", "auto_map", "finetuning_task", "_attn_implementation", "attn_implementation",
}  # fmt: skip
"""Keys of a configuration that say nothing of the net, or what kdctl says."""
_AUTO = {
    "sample": ("AutoModelForSequenceClassification",),
    "token": ("AutoModelForTokenClassification",),
    "vocabulary": ("AutoModelForMaskedLM", "AutoModelForCausalLM"),
}
_TO_CONVERT = (
    "python -c \"from transformers import AutoModel; AutoModel.from_pretrained('{0}').save_pretrained('{0}')\""
)
_LISTED = 6


class HuggingFaceModel:
    """A text model of the transformers library, with the head that the task asks for.

    The head is a classifier of the text, one of each token, or the prediction of tokens: of hidden ones where the model
    attends to both sides, of the next where it does not. The vocabulary has the size of the data's tokenizer.

    name: a folder with a config.json (it begins with `/`, `./`, `../` or `~`), or a name on the Hugging Face Hub, with
    @REVISION where a certain one is meant. `weights: pretrained` loads the folder's or the name's model.safetensors, or
    its shards; a pickle is never loaded, and code that comes with a model never run. What the file has not, as a rule
    the classifier, keeps its initial values; with fewer layers the first ones are loaded.
    config: the configuration as in its config.json, in place of the folder's; so a model's record holds it, and a run
    needs neither folder nor network again.
    attention: `eager` computes attention step by step, so that it can be tapped; `sdpa` in one call; `auto` leaves it
    to the library.
    Further arguments replace keys of the configuration (num_hidden_layers: 2, hidden_size: 128).
    """

    def __new__(  # type: ignore[misc]
        cls,
        *,
        name: str,
        config: dict[str, Any] | None = None,
        attention: Literal["auto", "sdpa", "eager"] = "auto",
        num_classes: int,
        vocab_size: int | None = None,
        max_length: int = 1,
        pad: int = 0,
        head: str = "sample",
        **arguments: Any,
    ) -> nn.Module:
        """The library's own module, not an instance of this class."""
        if vocab_size is None:
            raise ConfigError(Problem(f"huggingface:{name} reads texts, and the data are none", key="kind"))
        library = _transformers()
        raw = _kept(_read_config(name) if config is None else config, name)
        asked = {"num_labels": num_classes, "vocab_size": vocab_size, "pad_token_id": pad, "use_cache": False}
        settings = _settings(library, raw, arguments, asked, name)
        net = _create(library, settings, head, attention, name)
        _check_positions(net, max_length)
        net.own_arguments = {"config": raw}
        net.reads_segments = getattr(net.config, "type_vocab_size", 0) > 1
        net.pretrained_weights = functools.partial(_published, name=name)
        net.weights_of_folder = weights_of_folder
        return net

    def __init__(
        self,
        *,
        name: str,
        config: dict[str, Any] | None = None,
        attention: Literal["auto", "sdpa", "eager"] = "auto",
        num_classes: int,
        vocab_size: int | None = None,
        max_length: int = 1,
        pad: int = 0,
        head: str = "sample",
        **arguments: Any,
    ) -> None:
        """Says what `__new__` takes, to those who read signatures from source; it never runs."""


def find_folder(name: str, files: Sequence[str]) -> Path:
    """The folder of a name: itself, or that of the Hub's cache, with these files (patterns) where the Hub has them.

    Raises MissingError where there is no such folder, or nothing can be downloaded, as with --offline.
    """
    place = os.path.expanduser(name)
    if os.path.isdir(place):
        return Path(place)
    if name.startswith(("/", ".", "~")):
        hint = "name the folder that has the model's config.json"
        raise MissingError(Problem(f"there is no folder {name}", key="kind", hint=hint))
    try:
        import huggingface_hub
    except ImportError as error:
        raise MissingError(_not_installed("huggingface_hub")) from error
    offline = os.environ.get("KDCTL_OFFLINE", "0") not in ("", "0")
    repository, _, revision = name.partition("@")
    try:
        found = huggingface_hub.snapshot_download(
            repository, revision=revision or None, allow_patterns=list(files), local_files_only=offline
        )
    except Exception as error:  # the hub raises errors of several libraries
        first = (str(error).strip().splitlines() or [repr(error)])[0]
        message = f"huggingface:{name} could not be had: {first}"
        hint = "is that its name on the Hub? A folder is named by its path, as huggingface:./folder"
        raise MissingError(Problem(message, key="kind", hint=hint)) from error
    return Path(found)


# --------------------------------------------------------------------------------------------------------- building


def _transformers() -> ModuleType:
    try:
        ensure_torchvision()
        import transformers
    except ImportError as error:
        raise MissingError(_not_installed("transformers")) from error
    if int(transformers.__version__.partition(".")[0]) < 5:  # 4.48 leaves tied biases at zero
        message = f"transformers {transformers.__version__} is too old: 5.0 at least"
        raise MissingError(Problem(message, hint="pip install -U 'kdctl[huggingface]'"))
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def _not_installed(library: str) -> Problem:
    return Problem(f"{library} is not installed", hint="pip install 'kdctl[huggingface]'")


def _read_config(name: str) -> Any:
    folder = find_folder(name, [CONFIG])
    path = folder / CONFIG
    if not path.is_file():
        hint = "name the folder that has the model's config.json"
        raise MissingError(Problem(f"there is no {CONFIG} in {folder}", key="kind", hint=hint))
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(Problem(f"this is no model's configuration: {error}", file=str(path))) from None


def _kept(config: Any, name: str) -> dict[str, Any]:
    """What a configuration says of the net."""
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        message = f"the configuration of huggingface:{name} does not say its model_type"
        hint = "a config.json of the transformers library has one, such as bert"
        raise ConfigError(Problem(message, key="kind", hint=hint))
    if "quantization_config" in config:
        message = f"the weights of huggingface:{name} are quantised"
        hint = "name the model that they were made of; `kdctl compress --quantize` quantises"
        raise ConfigError(Problem(message, key="kind", hint=hint))
    return {key: value for key, value in config.items() if key not in _NOT_KEPT}


def _settings(
    library: ModuleType, raw: Mapping[str, Any], arguments: Mapping[str, Any], asked: Mapping[str, Any], name: str
) -> Any:
    """The library's configuration: the folder's, with the user's keys and those that the data ask for."""
    kind = raw["model_type"]
    if kind not in library.CONFIG_MAPPING:
        message = f"the installed transformers {library.__version__} has no model type '{kind}'"
        hint = "a later one may: pip install -U transformers; code that comes with a model is not run"
        raise ConfigError(Problem(message, key="kind", hint=hint))
    plain = {key: value for key, value in raw.items() if key != "model_type"}
    try:
        base = library.AutoConfig.for_model(kind, **plain)
        unknown = next((key for key in arguments if not hasattr(base, key)), None)
        if unknown is not None:
            hint = did_you_mean(unknown, base.to_dict()) or f"the keys are those of its {CONFIG}"
            raise ConfigError(Problem(f"a model of the type {kind} has no '{unknown}'", key="kind", hint=hint))
        own = type(base).attribute_map
        both = {own.get(key, key): value for key, value in {**arguments, **asked}.items() if hasattr(base, key)}
        settings = library.AutoConfig.for_model(kind, **plain | both)
    except ConfigError:
        raise
    except Exception as error:  # each model checks its configuration in its own way
        raise ConfigError(_does_not_take(name, error)) from error
    if getattr(settings, "is_encoder_decoder", False):
        message = f"huggingface:{name} has an encoder and a decoder; models of one of them are read"
        raise ConfigError(Problem(message, key="kind"))
    return settings


def _does_not_take(name: str, error: Exception) -> Problem:
    said = " ".join(str(error).split()) or repr(error)
    return Problem(f"huggingface:{name} does not take these arguments: {said[:300]}", key="kind")


def _create(library: ModuleType, settings: Any, head: str, attention: str, name: str) -> Any:
    """The net, newly initialised, in fp32."""
    choices = _AUTO.get(head, ())[:: -1 if getattr(settings, "is_decoder", False) else 1]
    auto = next((a for a in (getattr(library, c) for c in choices) if type(settings) in a._model_mapping), None)
    if auto is None:
        message = f"models of the type {settings.model_type} have no head for what the task asks of a model ({head})"
        hint = "for embeddings of texts: kind: bert, with the same weights" if head == "embedding" else None
        raise ConfigError(Problem(message, key="kind", hint=hint))
    chosen = {} if attention == "auto" else {"attn_implementation": attention}
    try:
        net = auto.from_config(settings, **chosen)
    except Exception as error:  # as above
        raise ConfigError(_does_not_take(name, error)) from error
    if "attention_mask" not in inspect.signature(net.forward).parameters:
        raise ConfigError(Problem(f"huggingface:{name} takes no attention_mask: it reads no padded texts", key="kind"))
    return net.float()


def _check_positions(net: Any, max_length: int) -> None:
    """Refuses longer texts than there are positions for."""
    limit = getattr(net.config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 0:
        return
    for name, module in net.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            limit -= module.padding_idx + 1  # as in RoBERTa, whose positions begin behind that of padding
            break
    if limit < max_length:
        message = f"the model has positions for {limit} tokens, texts have up to {max_length}"
        raise ConfigError(Problem(message, key="kind", hint=f"data.max_length: {limit}"))


# ---------------------------------------------------------------------------------------------------------- weights


def _published(net: nn.Module, name: str) -> dict[str, Tensor]:
    """The weights of the folder or name that the net was built of."""
    return weights_of_folder(net, find_folder(name, [CONFIG, WEIGHTS, INDEX, "model-*.safetensors", "tokenizer.json"]))


def weights_of_folder(net: Any, folder: Path) -> dict[str, Tensor]:
    """The weights of a model's folder in the names and shapes of `net`; what they lack of its head is that of `net`.

    Raises MissingError where there are none, ConfigError where they do not fit.
    """
    state = _cut_to_vocabulary(_read_folder(folder), net, folder)
    try:
        theirs, report = type(net).from_pretrained(
            None, config=copy.deepcopy(net.config), state_dict=state, output_loading_info=True,
            ignore_mismatched_sizes=True,
        )  # fmt: skip
    except Exception as error:  # the library raises many kinds
        said = " ".join(str(error).split())[:300]
        raise ConfigError(Problem(f"the weights in {folder} cannot be loaded: {said}", key="weights")) from error
    shapes = [key if isinstance(key, str) else key[0] for key in report["mismatched_keys"]]
    lacking = _not_loaded(theirs, {*report["missing_keys"], *shapes})
    wrong = [name for name in lacking if not _may_be_new(name, net.base_model_prefix)]
    if wrong:
        more = f" and {len(wrong) - _LISTED} more" if len(wrong) > _LISTED else ""
        message = f"the weights in {folder} lack, or have in another shape, {', '.join(wrong[:_LISTED])}{more}"
        hint = "do the kind and the keys that you set fit these weights?"
        raise ConfigError(Problem(message, key="weights", hint=hint))
    own, loaded = net.state_dict(), theirs.state_dict()
    return {name: own[name] if name in lacking else loaded[name].float() for name in own}


def _not_loaded(net: nn.Module, names: set[str]) -> list[str]:
    """Those of the names whose tensor is not that of a name that was loaded, as tied weights are."""
    parameters = dict(net.named_parameters(remove_duplicate=False))
    loaded = {id(value) for name, value in parameters.items() if name not in names}
    return sorted(name for name in names if id(parameters.get(name)) not in loaded)


def _may_be_new(name: str, base: str) -> bool:
    """Whether a tensor belongs to a head, which the weights of another task lack."""
    return not name.startswith(f"{base}.") or ".pooler." in name


def _read_folder(folder: Path) -> dict[str, Tensor]:
    """The tensors of model.safetensors, or of the shards that its index names."""
    if (folder / WEIGHTS).is_file():
        return read_tensors(folder / WEIGHTS)
    index = folder / INDEX
    if index.is_file():
        try:
            named = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            shards = sorted({str(shard) for shard in named.values()})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(Problem(f"this is no index of weights: {error!r}", file=str(index))) from None
        outside = next(
            (shard for shard in shards if Path(shard).name != shard or not shard.endswith(".safetensors")), None
        )
        if outside is not None:
            raise ConfigError(Problem(f"'{outside}' is no safetensors file of this folder", file=str(index)))
        return {name: value for shard in shards for name, value in read_tensors(folder / shard).items()}
    if any(folder.glob("pytorch_model*.bin")):
        message = f"{folder} has its weights as a pickle alone (pytorch_model.bin), which is not loaded"
        hint = f"where you trust it, write them as {WEIGHTS}: {_TO_CONVERT.format(folder)}"
        raise ConfigError(Problem(message, key="weights", hint=hint))
    raise MissingError(Problem(f"there is no {WEIGHTS} in {folder}", key="weights"))


def _cut_to_vocabulary(state: dict[str, Tensor], net: Any, folder: Path) -> dict[str, Tensor]:
    """The tensors without the rows of tokens behind the last one of the tokenizer, which fill a vocabulary up."""
    own = net.state_dict()
    words = net.get_input_embeddings().weight
    name = next(n for n, value in net.named_parameters(remove_duplicate=False) if value is words)
    found = next((value for key, value in state.items() if _same(name, key)), None)
    if found is None or len(found) == len(words):
        return state
    if len(found) < len(words) or not (folder / "tokenizer.json").is_file():
        message = f"the weights in {folder} are of {len(found):,} tokens, the data's tokenizer makes {len(words):,}"
        hint = f"data.tokenizer: {folder}, the tokenizer that the model was trained with"
        raise ConfigError(Problem(message, key="weights", hint=hint))
    size = {n: value.shape for n, value in own.items() if value.shape[:1] == words.shape[:1]}
    return {
        key: value[: len(words)]
        if len(value.shape) and len(value) == len(found) and any(_same(n, key) for n in size)
        else value
        for key, value in state.items()
    }


def _same(own: str, theirs: str) -> bool:
    """Whether a name of a file is that of the net, with or without what stands before an encoder's names."""
    return own == theirs or own.endswith(f".{theirs}")
