"""Recipes, jobs/train/recipe.py."""

import pytest

from jobs.train.recipe import RECIPES, Recipe, make_recipe, paper_1x
from schemas.errors import UsageError
from schemas.spec_loader import parse_spec
from schemas.train_spec import RecipeSpec


def test_the_rate_rises_linearly_and_falls_to_a_tenth_at_each_milestone() -> None:
    recipe = Recipe("r", steps=100, milestones=(0.6, 0.8), warmup_steps=10, warmup_factor=0.0)
    rates = [recipe.rate_at(step) for step in (0, 4, 9, 10, 59, 60, 79, 80, 99)]
    assert rates == pytest.approx([0.002, 0.01, 0.02, 0.02, 0.02, 0.002, 0.002, 0.0002, 0.0002])


def test_the_paper_schedule_falls_at_60_000_and_80_000_steps() -> None:
    recipe = paper_1x()
    assert recipe.rate_at(59_999) == pytest.approx(0.02)
    assert recipe.rate_at(60_000) == pytest.approx(0.002)
    assert recipe.rate_at(80_000) == pytest.approx(0.0002)


def test_a_cosine_ends_at_nothing() -> None:
    recipe = Recipe("r", steps=110, schedule="cosine", warmup_steps=10, warmup_factor=0.0)
    assert recipe.rate_at(10) == pytest.approx(0.02)
    assert recipe.rate_at(60) == pytest.approx(0.01)
    assert recipe.rate_at(109) < 1e-4


def test_the_rate_is_scaled_by_the_batch() -> None:
    small = Recipe("r", steps=100, warmup_steps=0, total_batch=4)
    assert small.rate_at(0) == pytest.approx(0.02 / 4)


@pytest.mark.parametrize("name", RECIPES)
def test_every_named_recipe_is_whole_and_says_how_it_is_run(name: str) -> None:
    recipe = RECIPES[name]()
    assert recipe.name == name
    assert recipe.augmentation.flip == recipe.flip
    assert "Command" in (RECIPES[name].__doc__ or "")


def test_a_spec_changes_what_it_sets_and_nothing_else() -> None:
    recipe = make_recipe(parse_spec(RecipeSpec, {"steps": 50, "learning_rate": 0.1}, "spec"))
    assert (recipe.steps, recipe.learning_rate, recipe.warmup_steps) == (50, 0.1, 5)
    assert recipe.optimizer == RECIPES["finetune"]().optimizer


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"steps": 10, "warmup_steps": 10}, "warmup_steps 10 is not less than steps 10"),
        ({"total_batch": 5, "accumulate": 2}, "not a multiple"),
        ({"schedule": "multi_step", "milestones": [0.8, 0.6]}, "do not rise"),
        ({"canvas_px": 512}, "belong together"),
        ({"copy_paste": 0.5}, "needs large-scale jitter"),
        ({"shorter_sides": [2000]}, r"recipe: .*max_size_px is 1024; wanted >= the greatest"),
        ({"name": "lsj_100ep", "scale_jitter": [2.0, 0.1]}, r"recipe: .*scale_jitter"),
        ({"name": "lsj_100ep", "shorter_sides": [800]}, "shorter_sides is for multi-scale"),
        ({"scale_jitter": [0.5, 2], "canvas_px": 512, "max_size_px": 800}, "max_size_px is for multi-scale"),
        ({"schedule": "multi_step"}, "multi_step needs milestones, of which finetune has none"),
        ({"milestones": [0.5]}, "milestones are for the schedule multi_step"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, object], problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        make_recipe(parse_spec(RecipeSpec, settings, "spec"))


def test_another_schedule_takes_the_milestones_along() -> None:
    recipe = make_recipe(parse_spec(RecipeSpec, {"name": "paper_1x", "schedule": "cosine"}, "spec"))
    assert recipe.milestones == ()
    steps = {"schedule": "multi_step", "milestones": [0.6, 0.8]}
    assert make_recipe(parse_spec(RecipeSpec, steps, "spec")).milestones == (0.6, 0.8)
