"""Input channels: those of published models put where a control is taken, the new ones zero."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ardrag_rl.policies.transformer import CausalWanTransformer3DModel

MASK_CHANNELS = 4  # Wan's: one for each pixel frame of a latent one


def widen(transformer: CausalWanTransformer3DModel) -> CausalWanTransformer3DModel:
    """Grows the patch embedding in place to latent, mask, reference and trajectory; one that has them stays as it is.

    With C latent channels (16), the columns of a source go where the same thing comes in; the others are zero:

    | source | its channels | ours |
    |---|---|---|
    | text to video (Wan2.1-T2V, Self-Forcing, ...) | C latent | latent |
    | image to video (SkyReels-V2-I2V, Fun-InP) | C latent, r mask, C condition | latent, mask, reference |
    | Fun-Control (V1.0) | C latent, C control, C start image | latent, trajectory, reference |

    So a widened model gives what its source gives for the same latent, condition and control: any trajectory at first,
    for the first two, and the zeros of an absent control for the third.

    Raises:
        ValueError: the number of input channels is none of these.
    """
    old, given = transformer.patch_embedding, int(transformer.config["in_channels"])
    channels = int(transformer.config["out_channels"])
    if given > 3 * channels:
        return transformer
    weight = old.weight.data
    latent, rest = weight[:, :channels], weight[:, channels:]

    def zeros(count: int) -> Tensor:
        return weight.new_zeros(len(weight), count, *weight.shape[2:])

    if given == channels:
        parts = [latent, zeros(MASK_CHANNELS + 2 * channels)]
    elif given == 3 * channels:
        control, start = rest.split(channels, 1)
        parts = [latent, zeros(MASK_CHANNELS), start, control]
    elif given > 2 * channels:
        parts = [latent, rest, zeros(channels)]
    else:
        raise ValueError(
            f"the transformer takes in_channels={given} for {channels} latent ones: expected {channels} (text to "
            f"video), {2 * channels} and a mask (image to video), {3 * channels} (Fun-Control), or more."
        )
    wide = torch.cat(parts, 1)
    new = nn.Conv3d(wide.shape[1], len(wide), old.kernel_size, old.stride, device="meta")  # type: ignore[arg-type]
    new.weight, new.bias = nn.Parameter(wide), old.bias
    transformer.patch_embedding = new
    transformer.register_to_config(in_channels=wide.shape[1])
    return transformer
