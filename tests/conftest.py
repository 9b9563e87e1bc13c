"""A whole pipeline with random weights, small enough for a CPU: what the tests run on."""

import os
import shutil
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded in tests
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

torch.set_num_threads(1)

SIZE = 32  # px; latents are (4, 8, 8)


@pytest.fixture(scope="session", autouse=True)
def ray_folder():
    """Where Ray, of this process and of those it starts, keeps its files; a short path, for it holds sockets."""
    folder = tempfile.mkdtemp(prefix="ray")
    os.environ["RAY_TMPDIR"] = folder
    yield
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory) -> Path:
    """A pipeline folder in diffusers layout: 32x32 px, latents (4, 8, 8), 3 steps, a window of 3 frames."""
    from ardrag_rl import hub
    from ardrag_rl.distill.codec_training import image_autoencoder
    from ardrag_rl.distill.text_encoder import save_text_encoder
    from ardrag_rl.flow import Schedule
    from ardrag_rl.policies import CausalWanTransformer3DModel

    path = tmp_path_factory.mktemp("pipeline")
    torch.manual_seed(0)
    image_autoencoder(4, (8, 16, 16), blocks=1, shortcuts=True, head_dim=8).save_pretrained(path / "vae")

    save_text_encoder(path, ["a blue circle moves over the red square"], dim=16, max_length=8)

    CausalWanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=3 * 4 + 1,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        window=3,
    ).save_pretrained(path / "transformer")

    hub.save_schedule(path, Schedule())
    hub.save_index(path, SIZE, SIZE)
    return path
