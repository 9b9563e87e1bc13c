"""A video from any image and a drag path.

    python experiments/generate.py --image photo.jpg --drag drag.json --output video.mp4

`drag.json` holds `{"points": [[[x, y], ...]], "units": "pixels"}`, one list of positions per dragged point, or
fractions of width and height. The output is an .mp4 or a .gif; `--draw true` shows the drag path on it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from trl import TrlParser

import ardrag_rl
from ardrag_rl.envs.render import draw_drag
from ardrag_rl.envs.tasks import fit, image_task
from ardrag_rl.media import write_gif, write_video
from ardrag_rl.training.config import CODEC_HELP, json_object


@dataclass
class GenerateArguments:
    """What to generate."""

    image: str = field(metadata={"help": "The reference image."})
    drag: str = field(metadata={"help": "JSON file with the drag path."})
    prompt: str = field(default="", metadata={"help": "What the video shows."})
    pipeline: str = field(default="tiny", metadata={"help": "An embedded pipeline, a folder, or a hub id."})
    output: str = field(default="video.mp4", metadata={"help": "An .mp4 or .gif file."})
    num_frames: int = field(default=16, metadata={"help": "Latent frames."})
    seed: int = field(default=0, metadata={"help": "Of all noise."})
    fps: float = field(default=8, metadata={"help": "Frames per second of the file."})
    draw: bool = field(default=False, metadata={"help": "Draw the drag path on the video."})
    kernel: str = field(default="ode", metadata={"help": "Of all steps: ode, or renoise as Algorithm 1 samples."})
    cache: str | None = field(default=None, metadata={"help": "The caching strategy; unset: the pipeline's own."})
    codec_settings: dict[str, Any] | str | None = field(default=None, metadata=CODEC_HELP)
    device: str = field(default="cpu", metadata={"help": "Where the model runs."})

    def __post_init__(self) -> None:
        self.codec_settings = json_object(self.codec_settings, "codec_settings", '{"slicing": true}')


def main() -> None:
    """Generate and write."""
    (args,) = TrlParser((GenerateArguments,)).parse_args_and_config()
    if not args.output.lower().endswith((".mp4", ".gif")):
        raise ValueError(f"output={args.output!r}: expected a name that ends in .mp4 or .gif.")
    if not args.fps > 0:
        raise ValueError(f"fps={args.fps}: expected a number above 0.")
    if not Path(args.output).parent.is_dir():
        raise ValueError(f"output={args.output!r}: the folder {str(Path(args.output).parent)!r} is not there.")
    video = ardrag_rl.generate(
        args.pipeline,
        args.image,
        args.drag,
        args.prompt,
        args.seed,
        args.num_frames,
        kernel=args.kernel,
        device=args.device,
        codec_settings=args.codec_settings,
        cache=args.cache,
    )
    if args.draw:
        task = image_task(args.image, args.drag, args.prompt, len(video))
        control = fit(task, len(video), *video.shape[-2:]).control
        drawn = [torch.from_numpy(draw_drag(frame, control, t)) for t, frame in enumerate(video)]
        video = torch.stack(drawn).permute(0, 3, 1, 2) / 255
    (write_gif if args.output.lower().endswith(".gif") else write_video)(args.output, video, args.fps)
    print(f"wrote {len(video)} frames to {args.output}")


if __name__ == "__main__":
    main()
