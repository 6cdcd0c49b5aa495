"""Errors for rows that cannot be trained on. Loading drops and counts such rows and quotes the first of each kind."""

from nemo_rao.errors import UserError


class BoundaryError(UserError):
    """A row without a token boundary between prompt and response. Loading drops and counts such rows.

    Attributes:
        reason: label under which the dropped rows are counted.
    """

    reason = "no boundary in tokens between prompt and response"


class ContentError(BoundaryError):
    """A row with text or a field that the chat template leaves out."""

    reason = "text or fields that the chat template leaves out"


class ThinkingError(BoundaryError):
    """A row whose answer does not continue the thinking block that the generation prompt opens."""

    reason = "the generation prompt opens a block that the answer does not continue"


class NothingToLearnError(BoundaryError):
    """A row whose answers all have weight 0."""

    reason = "no answer to learn (weight 0)"
