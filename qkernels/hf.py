"""Hugging Face model directories: load them, and store quantized ones so that they load again without a network.

A quantized directory holds what `qkernels.save` writes, the model's `config.json` (whose `architectures`
names the class) and the tokenizer's own files. Loading builds the class from the configuration with its parameters on
the meta device, so that no float copy of the weights ever exists, and fills it with `qkernels.load`.

transformers is imported inside the functions: the package itself does not need it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qkernels import serialization
from qkernels._atomic import replacing

# Side files of a model directory that transformers' save_pretrained calls do not write: pooling of sentence encoders,
# image and audio preprocessing, the chat template, labels. Folders are copied whole.
SIDE_FILES = (
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "1_Pooling",
    "preprocessor_config.json",
    "processor_config.json",
    "generation_config.json",
)
PathLike = str | os.PathLike[str]


def is_quantized(directory: PathLike) -> bool:
    """True where `qkernels.save` wrote `directory`."""
    return (Path(directory) / serialization.MANIFEST).is_file()


def find_gguf(directory: PathLike, gguf_file: str | None = None) -> str | None:
    """Name of the GGUF file to read in `directory`, or None where the directory holds an ordinary checkpoint.

    Args:
        gguf_file: the user's choice; needed only where several GGUF files lie there.

    Raises:
        ValueError: no such directory, no such file, or several files and no choice.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise ValueError(f"model directory: expected an existing directory, got {str(directory)!r}")
    if gguf_file is not None:
        if not (folder / gguf_file).is_file():
            raise ValueError(f"gguf_file: expected a file in {folder}, got {gguf_file!r}")
        return gguf_file
    if (folder / "config.json").is_file():
        return None
    names = sorted(path.name for path in folder.glob("*.gguf"))
    if not names:
        raise ValueError(f"model directory: expected config.json or a .gguf file in {folder}, found neither")
    if len(names) > 1:
        raise ValueError(f"gguf_file: {folder} holds several, name one of: {', '.join(names)}")
    return names[0]


def load_config(directory: PathLike) -> Any:
    """The transformers configuration of a directory.

    Raises:
        ValueError: the installed transformers does not know the model.
        OSError: no readable `config.json`.
    """
    with quiet():
        return _transformers().AutoConfig.from_pretrained(str(directory), local_files_only=True)


def model_class(config: Any) -> Any:
    """The class that a configuration stands for: the one `architectures` names, else transformers' AutoModel.

    Raises:
        ValueError: `architectures` names a class that the installed transformers lacks.
    """
    transformers = _transformers()
    names = list(getattr(config, "architectures", None) or [])
    if not names:
        return transformers.AutoModel
    found = getattr(transformers, names[0], None)
    if found is None:
        raise ValueError(
            f"config.json: architectures names {names[0]!r}, which transformers {transformers.__version__} lacks "
            "(models that bring their own code are not loaded)"
        )
    return found


def load_float(
    directory: PathLike, *, gguf_file: str | None = None, dtype: torch.dtype | None = torch.float32
) -> nn.Module:
    """The float model of a directory, in eval mode, from local files only.

    Args:
        gguf_file: the GGUF file to read, where the directory holds several.
        dtype: dtype of the parameters; None keeps what the checkpoint has.

    Raises:
        ValueError: no model there.
        OSError: unreadable files, in transformers' words.
    """
    gguf = find_gguf(directory, gguf_file)
    # A GGUF file names no class, and reading its configuration apart would parse the whole file twice.
    cls = _transformers().AutoModelForCausalLM if gguf else model_class(load_config(directory))
    arguments: dict[str, Any] = {"gguf_file": gguf} if gguf else {}
    with quiet():
        model = cls.from_pretrained(
            str(directory), dtype=dtype if dtype is not None else "auto", local_files_only=True, **arguments
        )
    quantizer = getattr(model, "hf_quantizer", None)
    if gguf and quantizer is not None:
        # The weights are plain tensors now; while transformers still thinks of the GGUF file, it refuses to save them.
        quantizer.remove_quantization_config(model)
    return model.eval()


def load_tokenizer(directory: PathLike, *, gguf_file: str | None = None) -> Any:
    """The tokenizer of a directory, or None where there is none."""
    transformers = _transformers()
    gguf = None if is_quantized(directory) else find_gguf(directory, gguf_file)
    arguments = {"gguf_file": gguf} if gguf else {}
    if not gguf and not _has_tokenizer(directory):
        return None
    with quiet():
        return transformers.AutoTokenizer.from_pretrained(str(directory), local_files_only=True, **arguments)


def skeleton(config: Any) -> nn.Module:
    """A model without weights: parameters on the meta device, buffers (position tables) real.

    Raises:
        ValueError: the configuration names no class, or one that transformers lacks.
    """
    if not getattr(config, "architectures", None):
        raise ValueError("config.json: expected `architectures` to name the model's class, it is missing")
    cls = model_class(config)
    dtype = getattr(config, "dtype", None) or torch.float32
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with _parameters_on_meta():
            model = cls(config)
    finally:
        torch.set_default_dtype(default)
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    return model.eval()


def load_quantized(directory: PathLike) -> nn.Module:
    """A quantized model from a directory that `save_quantized` wrote, in eval mode.

    Raises:
        ValueError: not such a directory, or its files contradict each other.
    """
    if not is_quantized(directory):
        raise ValueError(f"model directory: {directory} holds no quantized model (no {serialization.MANIFEST})")
    config = load_config(directory)
    with quiet():
        model = skeleton(config)
    serialization.load(model, directory)
    generation = Path(directory) / "generation_config.json"
    if generation.is_file() and hasattr(model, "generation_config"):
        with quiet():
            model.generation_config = _transformers().GenerationConfig.from_pretrained(
                str(directory), local_files_only=True
            )
    return model.eval()


def check_output(directory: PathLike, *, force: bool = False) -> Path:
    """Refuse an output directory that cannot be written, before any long work.

    Raises:
        ValueError: it exists and `force` is off, or `force` is on and it holds something else than a quantized
            model.
        OSError: its parent cannot be written.
    """
    target = Path(directory).absolute()
    if target.exists():
        if not force:
            raise ValueError(f"output: {target} exists already (pass --force to replace it)")
        if not target.is_dir() or not (is_quantized(target) or not any(target.iterdir())):
            raise ValueError(f"output: {target} is not a quantized model, and only such a directory is replaced")
    target.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(target.parent, os.W_OK):
        raise PermissionError(f"output: no permission to write in {target.parent}")
    return target


def save_quantized(
    model: nn.Module,
    directory: PathLike,
    *,
    tokenizer: Any = None,
    source: PathLike | None = None,
    force: bool = False,
    extra: Mapping[str, str] | None = None,
) -> Path:
    """Store a quantized transformers model so that `load_quantized` finds everything it needs.

    The files are written to a fresh directory beside the target, which is then renamed: a failure leaves an earlier
    output as it was.

    Args:
        tokenizer: stored with the model.
        source: the directory that the model came from; its side files are copied.
        force: replace an earlier quantized model there.
        extra: further text files to store, content by file name.
    """
    target = check_output(directory, force=force)
    with replacing(target, drop=lambda old: [entry.name for entry in old.iterdir()]) as content:
        serialization.save(model, content)
        write_config(model, content)
        if tokenizer is not None:
            with quiet():
                tokenizer.save_pretrained(str(content))
        if source is not None:
            _copy_side_files(Path(source), content)
        for name, text in (extra or {}).items():
            (content / name).write_text(text, encoding="utf-8")
    return target


def write_config(model: nn.Module, directory: Path) -> None:
    """Write `config.json` (and `generation_config.json`) of a model, naming its class.

    Raises:
        TypeError: the model carries no transformers configuration.
    """
    config: Any = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        raise TypeError(f"model: expected a transformers model with a configuration, got {type(model).__name__}")
    facts = config.to_dict()
    # A float source that came from a compressed file (GGUF) says so here; the directory written now is ours alone.
    facts.pop("quantization_config", None)
    facts["architectures"] = [type(model).__name__]
    (directory / "config.json").write_text(
        json.dumps(facts, indent=2, sort_keys=True, default=str) + "\n", encoding="utf-8"
    )
    generation: Any = getattr(model, "generation_config", None)
    if generation is not None:
        with quiet():
            generation.save_pretrained(str(directory))


def mean_pool(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Sentence embeddings: mean of the unmasked tokens, scaled to length 1.

    Args:
        hidden: `[batch, tokens, width]`.
        mask: `[batch, tokens]`, 1 for a token and 0 for padding.

    Returns:
        `[batch, width]` in fp32.
    """
    weights = mask.unsqueeze(-1).to(torch.float32)
    total = (hidden.to(torch.float32) * weights).sum(dim=1)
    return nn.functional.normalize(total / weights.sum(dim=1).clamp_min(1.0), dim=-1)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' own progress bars and warnings; the callers show theirs."""
    logging = _transformers().utils.logging
    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Every parameter registered inside goes to the meta device, buffers stay real.

    `torch.device("meta")` would take the buffers along, and a checkpoint does not hold the non-persistent ones.
    """
    original = nn.Module.register_parameter

    def register(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
        original(module, name, param)

    nn.Module.register_parameter = register  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


def _copy_side_files(source: Path, target: Path) -> None:
    for name in SIDE_FILES:
        if (target / name).exists():
            continue
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name)
        elif (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _has_tokenizer(directory: PathLike) -> bool:
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.txt", "vocab.json", "spiece.model")
    return any((Path(directory) / name).is_file() for name in names)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError('this needs transformers: pip install "qkernels[hf]"') from error
    return transformers
