"""Where a pipeline lies: the diffusers folder layout, by name, folder or hub id.

The layout is `model_index.json` beside `transformer/`, `vae/`, `text_encoder/`, `tokenizer/` and `scheduler/`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from torch import Tensor

from ardrag_rl.flow import Schedule

ASSETS = Path(__file__).parent / "assets"
COMPONENTS = {  # folder -> (library, class); the codec may be any diffusers autoencoder
    "transformer": ("ardrag_rl.policies", "CausalWanTransformer3DModel"),
    "vae": ("diffusers", "AutoencoderDC"),
    "text_encoder": ("transformers", "UMT5EncoderModel"),
    "tokenizer": ("transformers", "PreTrainedTokenizerFast"),
    "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
}
OWN = {  # of model_index.json, whatever the other components are
    "_class_name": "ARDragPipeline",
    "transformer": list(COMPONENTS["transformer"]),
    "scheduler": list(COMPONENTS["scheduler"]),
}
CONVERT = "experiments/convert.py makes one of other checkpoints."


def pipeline_path(name: str | Path) -> Path:
    """The folder of a pipeline.

    Args:
        name: an embedded pipeline ("tiny"), a folder, or a hub id ("owner/name"), which is downloaded once.

    Raises:
        ValueError: none of these; the message says what exists.
    """
    embedded = sorted(p.parent.name for p in ASSETS.glob("*/model_index.json"))
    if str(name) in embedded:
        return ASSETS / str(name)
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise ValueError(
                f"the folder {str(name)!r} has no model_index.json: expected a pipeline in diffusers layout. {CONVERT}"
            )
        return folder
    if folder.is_file():
        raise ValueError(f"{str(name)!r} is a file: expected a pipeline in diffusers layout. {CONVERT}")
    if isinstance(name, str) and name.count("/") == 1 and not name.startswith((".", "/", "~")):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        try:
            return Path(snapshot_download(name, ignore_patterns=["*.bin", "*.pt", "*.pth", "*.ckpt"]))
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            raise ValueError(
                f"pipeline {name!r} is neither a folder here nor could it be had from the hub ({error})."
            ) from error
    raise ValueError(
        f"pipeline {str(name)!r} is unknown: expected an embedded one ({', '.join(embedded) or 'none'}), a folder with "
        "a model_index.json, or a hub id 'owner/name'."
    )


def check_weights(folder: Path) -> None:
    """Refuses a part of a pipeline that is a configuration only.

    Raises:
        ValueError: it holds no .safetensors file.
    """
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"{str(folder)!r} holds no weights (*.safetensors). {CONVERT}")


def load_schedule(path: Path) -> Schedule:
    """The few-step schedule, key `timesteps` of scheduler/scheduler_config.json; AR-Drag's where it has none."""
    config = read_json(path / "scheduler" / "scheduler_config.json")
    steps = config.get("timesteps")
    return Schedule(tuple(steps)) if steps else Schedule()


def save_schedule(path: Path, schedule: Schedule) -> None:
    """Writes scheduler/scheduler_config.json; the class named is the one diffusers would run such a model with."""
    write_json(
        path / "scheduler" / "scheduler_config.json",
        {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "num_train_timesteps": 1000,
            "timesteps": list(schedule.timesteps),
        },
    )


def pipeline_size(path: Path, height: int | None = None, width: int | None = None) -> tuple[int, int]:
    """(height, width) in pixels: as given, where None the pipeline's own.

    Its own are `sample_height` and `sample_width` of model_index.json.

    Raises:
        ValueError: one is not given, and the pipeline names none.
    """
    if height is not None and width is not None:
        return height, width
    index = read_json(path / "model_index.json")
    if "sample_height" not in index or "sample_width" not in index:
        raise ValueError(f"the pipeline {str(path)!r} names no resolution of its own: pass height= and width=.")
    own = int(index["sample_height"]), int(index["sample_width"])
    return own[0] if height is None else height, own[1] if width is None else width


def local_file(file: str | Path) -> Path:
    """A file that the user brings.

    Raises:
        FileNotFoundError: there is no such file.
    """
    if not Path(file).is_file():
        raise FileNotFoundError(f"{file} does not exist: give a local file.")
    return Path(file)


def read_weights(file: str | Path, entries: Sequence[str] = (), bare: bool = True) -> dict[str, Tensor]:
    """Tensors by name from a file that the user brings, read as data only.

    Args:
        file: .safetensors, or what `torch.save` wrote.
        entries: of the latter, below which names the weights may be; the first that is there counts.
        bare: whether they may lie at the top as well.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else.
    """
    path = local_file(file)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        # mapped where the format allows it, so that only what is used is read
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
    except OSError:
        raise
    except Exception as error:  # torch, its unpickler and safetensors have many
        raise ValueError(
            f"{str(file)!r} could not be read as a file of nothing but weights: expected .safetensors, or a state dict "
            "by torch.save; nothing else that a pickle or torchscript may hold is read. "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{str(file)!r} holds a {type(content).__name__}: expected a dict of weights.")
    entry = next((e for e in entries if content.get(e) and isinstance(content[e], dict)), None)
    weights = content[entry] if entry is not None else content if bare else {}
    if not weights or not all(isinstance(value, Tensor) for value in weights.values()):
        wanted = " or ".join([*entries, *(["tensors by name"] if bare else [])])
        found = sorted(map(str, content))
        more = f" and {len(found) - 5} more" if len(found) > 5 else ""
        raise ValueError(f"{str(file)!r} has the entries {found[:5]}{more}: expected {wanted}.")
    return weights


def save_index(path: Path, height: int, width: int) -> None:
    """Writes the model_index.json of a pipeline for height x width pixels, with the classes in `COMPONENTS`."""
    index = {k: list(v) for k, v in COMPONENTS.items()} | OWN
    write_json(path / "model_index.json", index | {"sample_height": height, "sample_width": width})


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: the file is missing or is not a JSON object.
    """
    try:
        value = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{str(path)!r} could not be read as JSON: {error}.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{str(path)!r} holds a {type(value).__name__}: expected a JSON object.")
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes through a temporary file, so that a half-written one is never found."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    temporary.replace(path)
