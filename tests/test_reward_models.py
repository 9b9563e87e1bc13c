"""Reward models from files: LAION's aesthetic predictor, CLIP score and PickScore against their formulas."""

from __future__ import annotations

import copy
import itertools
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from ardrag_rl.control import Control
from ardrag_rl.rewards import Aesthetic, ClipScore, PickScore, Reward, make_rewards

WIDTHS = (768, 1024, 128, 64, 16, 1)  # of LAION's MLP


def clips(prompts: tuple[str, ...] = ("a cat", "a dog")) -> tuple[Tensor, list[Control]]:
    """Two frames each, wider than high, on 8-bit values."""
    shape = (len(prompts), 2, 3, 40, 56)
    video = torch.randint(256, shape, generator=torch.Generator().manual_seed(0)) / 255
    return video, [Control(torch.zeros(2, 0, 3), prompt, video[0, 0]) for prompt in prompts]


def pictures(video: Tensor) -> list[Image.Image]:
    return [Image.fromarray((255 * f).round().byte().permute(1, 2, 0).numpy()) for f in video.flatten(0, 1)]


def normalised(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


# --- LAION -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def architecture(tmp_path: Path) -> str:
    """An open_clip architecture by name that is ViT-L-14 but for depth and width; embeddings of 768."""
    import open_clip

    config = {
        "embed_dim": 768,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 28, "layers": 1, "width": 64, "head_width": 32, "patch_size": 14},
        "text_cfg": {"context_length": 8, "vocab_size": 16, "width": 16, "heads": 1, "layers": 1},
    }
    (tmp_path / "ViT-tiny-14.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "ViT-tiny-14.json")
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-tiny-14")
    save_file(model.state_dict(), tmp_path / "tower.safetensors")
    return "ViT-tiny-14"


def published_heads(folder: Path) -> dict[str, list[tuple[np.ndarray, np.ndarray]]]:
    """Files with LAION's names, keys and shapes, and their layers; scores are well within 1 to 10."""
    generator = torch.Generator().manual_seed(0)

    def layer(a: int, b: int, last: bool) -> tuple[Tensor, Tensor]:
        scale = (4.0 if a == 16 else 1.0) if last else a**-0.5
        bias = torch.full((1,), 8.0 if a == 16 else 5.0) if last else 0.1 * torch.randn(b, generator=generator)
        return scale * torch.randn(b, a, generator=generator), bias

    linear = layer(768, 1, True)
    torch.save(dict(zip(("weight", "bias"), linear, strict=True)), folder / "sa_0_4_vit_l_14_linear.pth")
    layers = [layer(a, b, b == 1) for a, b in itertools.pairwise(WIDTHS)]
    mlp = {
        f"layers.{i}.{k}": t
        for i, x in zip((0, 2, 4, 6, 7), layers, strict=True)
        for k, t in zip(("weight", "bias"), x, strict=True)
    }
    torch.save(mlp, folder / "sac+logos+ava1-l14-linearMSE.pth")
    save_file(mlp, folder / "mlp.safetensors")
    by_file = {"sa_0_4_vit_l_14_linear.pth": [linear]}
    by_file |= dict.fromkeys(("sac+logos+ava1-l14-linearMSE.pth", "mlp.safetensors"), layers)
    return {file: [(w.numpy(), b.numpy()) for w, b in layers] for file, layers in by_file.items()}


def test_laions_predictor_is_its_published_formula(architecture: str, tmp_path: Path) -> None:
    import open_clip

    tower = str(tmp_path / "tower.safetensors")
    model, _, prepare = open_clip.create_model_and_transforms(architecture, pretrained=tower)
    video, controls = clips()
    images = torch.stack([prepare(picture) for picture in pictures(video)])  # open_clip's own, on 8-bit pictures
    with torch.no_grad():
        embeddings = normalised(model.eval().encode_image(images).numpy())
    for file, layers in published_heads(tmp_path).items():
        raw = embeddings
        for weight, bias in layers:
            raw = raw @ weight.T + bias
        assert raw.min() > 1 and raw.max() < 10 and np.ptp(raw) > 0.2
        reward = Aesthetic(architecture, tower, tmp_path / file, batch_size=3)
        # frames are resized in float here, in 8 bits by open_clip
        np.testing.assert_allclose(reward.rate(video.flatten(0, 1)).numpy(), raw[:, 0], atol=0.03)
        np.testing.assert_allclose(reward(video, controls).flatten(), 1 + 4 * (raw[:, 0] - 1) / 9, atol=0.015)
        small = torch.nn.functional.interpolate(video.flatten(0, 1), (28, 28))  # nothing to resize: exact
        with torch.no_grad():
            exact = images[:1].new_tensor(normalised(model.encode_image((small - MEAN) / STD).numpy()))
        for weight, bias in layers:
            exact = exact @ torch.from_numpy(weight).T + torch.from_numpy(bias)
        torch.testing.assert_close(reward.rate(small), exact[:, 0], rtol=0, atol=1e-4)


MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]  # CLIP's
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]


def test_wrong_files_are_refused(architecture: str, tmp_path: Path) -> None:
    published_heads(tmp_path)
    tower, head = tmp_path / "tower.safetensors", tmp_path / "sa_0_4_vit_l_14_linear.pth"
    torch.save({"weight": torch.zeros(1, 512), "bias": torch.zeros(1)}, tmp_path / "vit_b.pth")
    torch.save({"weight": torch.zeros(2, 768), "bias": torch.zeros(2)}, tmp_path / "two.pth")
    state = torch.load(tmp_path / "sac+logos+ava1-l14-linearMSE.pth", weights_only=True)
    torch.save(state | {"layers.4.weight": torch.zeros(64, 64)}, tmp_path / "shape.pth")
    torch.save({k.replace("2", "3"): v for k, v in state.items()}, tmp_path / "relu.pth")
    torch.save(torch.nn.Linear(768, 1), tmp_path / "module.pth")
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    (tmp_path / "page.safetensors").write_text("<html>")
    for file, says in [
        ("vit_b.pth", "takes embeddings of 512 numbers, but tower ViT-tiny-14 makes 768"),
        ("two.pth", r"does not fit.*\[2, 768\]"),
        ("shape.pth", r"does not fit.*4\.weight.*\[64, 64\]"),
        ("relu.pth", r"has the keys .*layers\.3\.weight.*expected"),
        ("module.pth", "could not be read as a file of nothing but weights.*state dict"),
        ("tensor.pth", "holds a Tensor"),
        ("page.safetensors", "could not be read as a file of nothing but weights"),
    ]:
        with pytest.raises(ValueError, match=f"(?s){file}'? {says}"):
            Aesthetic(architecture, tower, tmp_path / file).rate(torch.rand(1, 3, 28, 28))
    for wrong in (head, tmp_path / "page.safetensors"):
        with pytest.raises(ValueError, match=f"weights {wrong} do not load as ViT-tiny-14"):
            Aesthetic(architecture, wrong, head).rate(torch.rand(1, 3, 28, 28))


# --- CLIP score ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random CLIP of two layers with its processor, as transformers saves them."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    letters = [chr(i) for i in range(ord("a"), ord("z") + 1)]
    vocabulary = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    ids = {token: i for i, token in enumerate(vocabulary)}
    layers = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    ends = {"bos_token_id": ids["<|startoftext|>"], "eos_token_id": ids["<|endoftext|>"], "pad_token_id": 0}
    config = CLIPConfig(
        text_config={**layers, **ends, "vocab_size": len(ids), "max_position_embeddings": 10},
        vision_config={**layers, "image_size": 24, "patch_size": 8},
        projection_dim=16,
        logit_scale_init_value=float(np.log(20)),
    )
    path = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(path)
    images = CLIPImageProcessor(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    CLIPProcessor(images, CLIPTokenizer(vocab=ids, merges=[])).save_pretrained(path)
    return path


@pytest.mark.parametrize(("make", "divisor"), [(ClipScore, 30), (PickScore, 26)])
def test_clip_score_is_its_formula(clip: Path, make: type[ClipScore], divisor: float) -> None:
    from transformers import CLIPModel, CLIPProcessor

    prompts = ("a cat", "a very long prompt that is cut", "a cat")
    video, controls = clips(prompts)
    model, processor = CLIPModel.from_pretrained(clip).eval(), CLIPProcessor.from_pretrained(clip)
    inputs = processor(
        text=list(prompts),
        images=pictures(video),
        padding="max_length",
        truncation=True,
        max_length=10,
        return_tensors="pt",
    )
    with torch.no_grad():
        logits = model(**inputs).logits_per_image.view(3, 2, 3)  # video, frame, prompt: 20 cos
    wanted = torch.stack([logits[i, :, i] for i in range(3)]) / divisor
    reward = make(clip, clip, batch_size=4)
    got = reward(video, controls)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
    assert (got[0] - got[1]).abs().max() > 0.01
    torch.testing.assert_close(reward.start(controls).append(video[:, :1]), got[:, :1])


def test_clip_scores_go_by_name_with_published_models() -> None:
    made = make_rewards({"clip_score": 1.0, "pickscore": 0.5})
    models = [term.reward.model for term in made if isinstance(term.reward, ClipScore)]
    assert models == ["openai/clip-vit-large-patch14", "yuvalkirstain/PickScore_v1"]
    assert len(pickle.dumps(copy.deepcopy(made))) < 2000


def test_what_is_no_clip_is_refused(clip: Path, tmp_path: Path) -> None:
    from transformers import CLIPModel

    video, controls = clips()
    with pytest.raises(ValueError, match=r"absent.*could not be loaded"):
        ClipScore(tmp_path / "absent")(video, controls)
    model = CLIPModel.from_pretrained(clip)
    model.vision_model.save_pretrained(tmp_path / "half")
    (tmp_path / "half" / "config.json").write_text((clip / "config.json").read_text())
    with pytest.raises(ValueError, match=r"half.*no whole CLIP model"):
        ClipScore(tmp_path / "half", clip)(video, controls)


# --- device, precision, batches --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tiny", "laion", "clip"])
def test_half_precision_and_batches_are_the_same_up_to_rounding(
    kind: str, clip: Path, architecture: str, tmp_path: Path
) -> None:
    published_heads(tmp_path)
    laion = architecture, tmp_path / "tower.safetensors", tmp_path / "mlp.safetensors"
    video, controls = clips(("a cat", "a dog", "an ox"))

    def score(**settings: Any) -> Tensor:
        made: Reward = {
            "tiny": Aesthetic,
            "laion": lambda **s: Aesthetic(*laion, **s),
            "clip": lambda **s: ClipScore(clip, **s),
        }[kind](**settings)
        return made(video, controls)

    full = score()
    assert full.dtype == torch.float32
    torch.testing.assert_close(score(batch_size=1), full, rtol=0, atol=1e-5)
    torch.testing.assert_close(score(batch_size=4), full, rtol=0, atol=1e-5)
    for dtype in (torch.bfloat16, torch.float16):
        half = score(dtype=dtype)
        assert half.dtype == torch.float32 and half.device.type == "cpu"
        assert 0 < (half - full).abs().max() < 0.05


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_models_run_on_their_own_device(clip: Path) -> None:
    video, controls = clips()
    for make in (Aesthetic, lambda **settings: ClipScore(clip, **settings)):
        scores = make(device="cuda")(video, controls)
        torch.testing.assert_close(scores, make()(video, controls), rtol=0, atol=0.01)
        half = make(device="cuda", dtype=torch.float16)(video.cuda(), controls)
        torch.testing.assert_close(half, scores, rtol=0, atol=0.05)
