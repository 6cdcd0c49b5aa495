"""The exported model's folder says how its run rendered prompts and answers."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_rao.config.compose import compose
from nemo_rao.config.recipe_text import to_yaml
from nemo_rao.data.rendering_record import Rendering
from nemo_rao.errors import UserError
from nemo_rao.hugging_face.rendering_of_run import rendering_of_run


def test_the_recipe_of_the_checkpoints_run_is_read(tmp_path: Path) -> None:
    checkpoint = tmp_path / "run" / "checkpoints" / "step=3-last"
    checkpoint.mkdir(parents=True)
    assert rendering_of_run(checkpoint) is None  # an imported model
    keys = ["data.train_path=x", "data.answers=verbatim", "data.template_arguments={date_string: 'July', think: false}"]
    recipe = tmp_path / "run" / "recipe.yaml"
    recipe.write_text(to_yaml(compose("gpt_rao", keys)))
    assert rendering_of_run(checkpoint) == Rendering("auto", {"date_string": "July", "think": False}, "verbatim")
    (tmp_path / "linked").symlink_to(checkpoint)
    assert rendering_of_run(tmp_path / "linked") == rendering_of_run(checkpoint)
    recipe.write_text("data: {chat_template: never, a_key_of_another_version: 1}")
    assert rendering_of_run(checkpoint) == Rendering("never")
    for text, part in (("data: [", "cannot be read as a recipe"), ("data: {answers: mine}", "data.answers is 'mine'")):
        recipe.write_text(text)
        with pytest.raises(UserError, match=part):
            rendering_of_run(checkpoint)
