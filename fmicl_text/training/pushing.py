"""transformers' Trainer with pushes to the Hub that are complete, carry a card and hold nothing private."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.trainer_utils import HubStrategy

from fmicl_text.hub import upload as hub
from fmicl_text.hub.model_card import write_card
from fmicl_text.hub.run_record import run_record, scores_at


class PushingTrainer(Trainer):
    """The part of `FMICLTrainer` that speaks to the Hub.

    Attributes:
        facts: What a trainer cannot know of its run, for the model card and the record; see `record.run_record`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.metadata: dict[str, Any] = {}
        self.background_push: Any = None
        super().__init__(*args, **kwargs)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the repository that `push_to_hub` writes to, before training: a name, token or right that is missing
        costs no hours then."""
        if self.is_world_process_zero():
            name = self.args.hub_model_id or Path(str(self.args.output_dir)).absolute().name
            private = self.args.hub_private_repo if private is None else private
            self.hub_model_id: Any = hub.create_repository(name, private, exist_ok=True, token=token)
            self.background_push = hub.BackgroundPush()

    def push_to_hub(  # type: ignore[override]
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
    ) -> str | None:
        """Save the encoder and upload it with its card; of the head, the optimizer and the record of the run nothing.

        Returns:
            Where it can be seen; None in other processes, and if it is not to block.

        Raises:
            HubError: The Hub could not be reached, or refused. Not blocking, it is a warning.
        """
        if self.hub_model_id is None:
            self.init_hf_repo(token, private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        folder, state = Path(str(self.args.output_dir)), self.state
        ended_with_the_best = self.args.load_best_model_at_end and 0 < state.max_steps <= state.global_step
        step = state.best_global_step if ended_with_the_best else state.global_step
        return self.push_folder(folder, commit_message or "Upload encoder", step or 0, blocking, revision, token)

    def push_folder(
        self,
        folder: Path,
        message: str,
        step: int,
        blocking: bool,
        revision: str | None = None,
        token: str | None = None,
    ) -> str | None:
        """Upload a folder that holds the encoder of a step, with a card of what is known of it."""
        write_card(run_record(self, scores_at(self, step)), folder, self.hub_model_id)
        options: dict[str, Any] = {"message": message, "revision": revision or self.args.hub_revision, "token": token}
        options |= {"private": self.args.hub_private_repo, "exist_ok": True}
        if blocking:
            self.background_push.wait()
            return hub.push(folder, str(self.hub_model_id), **options)
        self.background_push.start(folder, str(self.hub_model_id), **options)
        return None

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """The base class would push what it can copy from the checkpoint: no modules.json, pooling or card."""
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        if self.args.hub_always_push or not self.background_push.busy:
            step = self.state.global_step
            self.push_folder(Path(checkpoint_folder), f"Training in progress, step {step}", step, blocking=False)

    def _finish_current_push(self) -> None:
        if self.background_push is not None:
            self.background_push.wait()
