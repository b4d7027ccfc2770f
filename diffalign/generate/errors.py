"""What can be wrong with the setting of a run."""


class BadOption(ValueError):
    """A value of ``option`` that this model cannot be run with; ``reason`` says what to do."""

    def __init__(self, option: str, reason: str) -> None:
        super().__init__(f"{option}: {reason}")
        self.option, self.reason = option, reason
