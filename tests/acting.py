"""A policy acting by its sessions on conditions that an environment would fix at reset."""

import torch
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

from ardrag_rl.policies import CausalWanTransformer3DModel, VideoPolicy
from ardrag_rl.rollout import Rollout

BATCH, FRAMES, WINDOW = 2, 8, 3  # the last frame is beyond twice the window
SHAPE = (4, 8, 8)
SMALL = dict(
    patch_size=(1, 4, 4),
    num_attention_heads=2,
    attention_head_dim=12,
    in_channels=13,
    out_channels=4,
    text_dim=16,
    freq_dim=16,
    ffn_dim=32,
    num_layers=2,
)
CLOSE = dict(atol=2e-5, rtol=1e-4)


def small(seed=0, **changes):
    torch.manual_seed(seed)
    return VideoPolicy(CausalWanTransformer3DModel(**{**SMALL, "window": WINDOW, **changes}))


def conditions(frames=FRAMES, batch=BATCH, seed=0, **extra):
    """What an environment would fix at reset: noise, trajectory, reference, text."""
    g = torch.Generator().manual_seed(seed)
    noise, trajectory, reference = (torch.randn(batch, frames, *SHAPE, generator=g) for _ in range(3))
    return {"noise": noise, "trajectory": trajectory, "reference": reference, "text": text_of(batch, g), **extra}


def text_of(batch, g, length=8):
    return torch.randn(batch, length, 16, generator=g)


class Masked(WanAttnProcessor):
    """diffusers' attention with a mask that its block does not pass on."""

    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        return super().__call__(attn, hidden_states, encoder_hidden_states, self.mask, rotary_emb)


@torch.no_grad()
def masked_forward(plain, frames, timesteps, text, image, chunk, window):
    """diffusers' own model on frames (B, F, C_in, h, w) at timesteps (F,), under the banded mask -> (B, F, C, h, w)."""
    _, ph, pw = plain.config.patch_size
    tokens = frames.shape[-2] // ph * (frames.shape[-1] // pw)
    owner = torch.arange(frames.shape[1]).repeat_interleave(tokens)
    start = owner[:, None] // chunk * chunk  # of the query's chunk
    mask = (owner >= start - window) & (owner < start + chunk)
    for block in plain.blocks:
        block.attn1.set_processor(Masked(mask))
    per_token = timesteps.repeat_interleave(tokens).expand(len(frames), -1)
    return plain(frames.transpose(1, 2), per_token, text, image).sample.transpose(1, 2)


def observe(given, latents, m, n):
    """The environment's observation of a batch at frame m, step n."""
    obs = {key: value for key, value in given.items() if key != "noise"}
    batch = len(latents)
    return {**obs, "latents": latents, "frame": torch.full((batch, 1), m), "step": torch.full((batch, 1), n)}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def clean_pass(policy, given, clean):
    """Clean frames as the transformer takes them, their context, and the cache entries they leave."""
    inputs = policy.frame_inputs(clean, given["reference"], given["trajectory"])
    context = policy.transformer.encode_context(given["text"])
    return inputs, context, policy.transformer(context, inputs)[1]


@torch.no_grad()
def act(policy, plan, given, seed=0):
    """A rollout by sessions, as a collector takes it: recorded actions and the log-probabilities of the scored ones."""
    noise = given["noise"]
    batch, frames = noise.shape[:2]
    session, g, latents = policy.session(batch), generator(seed), noise.clone()
    states, log_probs = [], []
    for m in range(frames):
        chain = [latents[:, m].clone()]
        for n, kernel in enumerate(plan.kernels):
            step = session.transition(observe(given, latents, m, n), kernel)
            chain.append(step.sample(g))
            latents[:, m] = chain[-1]
            if n in plan.scored:
                log_probs.append(step.log_prob(chain[-1]))
        states.append(torch.stack(chain, 1))
    return Rollout(
        trajectory=given["trajectory"],
        reference=given["reference"],
        text=given["text"],
        image=given.get("image"),
        latents=torch.stack(states, 1),
        plan=plan,
        schedule=policy.schedule,
        log_probs=torch.stack(log_probs, 1).view(batch, frames, -1) if log_probs else torch.zeros(batch, frames, 0),
        rewards=torch.zeros(batch, frames),
        reward_terms={},
        task_ids=("t",) * batch,
        groups=torch.zeros(batch, dtype=torch.int64),
    )
