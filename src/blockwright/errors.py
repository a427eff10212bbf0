"""The one error that a user's mistake raises: what was wrong, what is allowed, what to do."""


class BlockwrightError(Exception):
    """A mistake in what the user gave us, told in one line.

    what : the thing and its value, e.g. `finequant: group_size=0`.
    allowed : what would have been accepted.
    do : the cure, as a sentence the reader can follow.
    """

    def __init__(self, what: str, *, allowed: str | None = None, do: str | None = None) -> None:
        self.what, self.allowed, self.do = what, allowed, do
        sentences = [what, f"Allowed: {allowed}" if allowed else "", do or ""]
        super().__init__(" ".join(s if s.endswith((".", "?")) else s + "." for s in sentences if s))
