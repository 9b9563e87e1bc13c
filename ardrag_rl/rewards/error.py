"""What goes wrong with rewards; every message names the reward."""


class RewardError(RuntimeError):
    """A reward raised, did not answer, or returned something that is not a score per frame."""


class RewardLeak(RewardError):
    """A reward keeps memory of its calls; a new process is free of it."""
