"""Why a row cannot be trained on. Loading drops and counts such rows, and quotes the first of each kind."""

from nemo_rao.errors import UserError


class BoundaryError(UserError):
    """A row whose prompt and response cannot be told apart in tokens. Loading drops and counts such rows.

    Attributes:
        reason: what rows dropped for the same cause are counted under.
    """

    reason = "no boundary in tokens between prompt and response"


class ContentError(BoundaryError):
    """A row of which the chat template leaves out text or a field. Dropped and counted like the others."""

    reason = "text or fields that the chat template leaves out"


class ThinkingError(BoundaryError):
    """A row whose answer does not continue the block of thinking that the generation prompt opens."""

    reason = "the generation prompt opens a block that the answer does not continue"


class NothingToLearnError(BoundaryError):
    """A row with an answer that is not to be learned, and no other. Dropped and counted like the others."""

    reason = "no answer to learn (weight 0)"
