"""HeldOut: fixed held-out tasks every k updates, their scores in the log and their videos beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

from ardrag_rl.training.evaluate import Evaluation
from ardrag_rl.training.report import draw_videos
from ardrag_rl.training.trainer import GRPOTrainer


class HeldOut(TrainerCallback):
    """Scores as `heldout/<reward>` where the Trainer reports to; videos as GIFs in a folder and in TensorBoard.

    Args:
        trainer: whose log takes the scores.
        evaluate: the same tasks with the same noise, whenever it is called.
        every: updates between calls.
        folder: of the GIFs.
    """

    def __init__(self, trainer: GRPOTrainer, evaluate: Callable[[], Evaluation], every: int, folder: Path) -> None:
        self._trainer, self._evaluate, self._every, self._folder = trainer, evaluate, every, folder

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluates where it is time; all processes do, so that none waits for another's weights."""
        if state.global_step % self._every:
            return
        evaluation = self._evaluate()
        for name in evaluation.terms:
            self._trainer.note(f"heldout/{name}", evaluation.mean(name))
        if state.is_world_process_zero:
            file = self._folder / f"{state.global_step:06d}.gif"
            file.parent.mkdir(parents=True, exist_ok=True)
            draw_videos(file, [evaluation])
            self._to_tensorboard(file, state.global_step)

    def _to_tensorboard(self, file: Path, step: int) -> None:
        """TensorBoard plays a GIF that is given as an image; its own `add_video` needs another library to make one."""
        from PIL import Image
        from tensorboard.compat.proto.summary_pb2 import Summary

        with Image.open(file) as image:
            width, height = image.size
        for callback in self._trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                picture = Summary.Image(
                    height=height, width=width, colorspace=3, encoded_image_string=file.read_bytes()
                )
                summary = Summary(value=[Summary.Value(tag="heldout", image=picture)])
                callback.tb_writer.file_writer.add_summary(summary, step)
