import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lohp_jax.codec import make_codec
from lohp_jax.evaluation import scores
from lohp_jax.evaluation.figures import figures
from lohp_jax.optimizers import make_optimizer
from lohp_jax.types import Generator


def straight(num_states, walks=True):
    """A generator that walks straight to the target."""

    def path(params, context, key, **_):
        return {"w": jnp.linspace(0.0, 1.0, num_states)[:, None] * context["seen"][None]}

    def apply(*args, **options):
        return {"w": path(*args, **options)["w"][-1]}

    return Generator(apply, (), path=path if walks else None)


def draw(family, main="lohp", **generators):
    """Figures of three walks, of which two have as many steps as the teacher, and one without a path."""
    tasks = scores.draw_tasks(family, jax.random.key(0), 4, "held_out")
    theta_0 = family.init(jax.random.key(0))
    return figures(
        family,
        {
            "lohp": straight(3),
            "cloning": straight(3),
            "long": straight(5),
            "nearest_task": straight(3, walks=False),
            **generators,
        },
        tasks,
        main=main,
        codec=make_codec(theta_0, channels=4),
        teacher="teacher_sgd",
        taught=scores.teacher(family, make_optimizer("sgd:0.1"), theta_0, 4).many(
            tasks.data, tasks.keys
        ),
        compression=2,
    )


@pytest.fixture
def drawn(family):
    return draw(family)


def test_of_a_family_with_an_objective(bowls):
    by_step = draw(bowls)["score_by_step"]
    first, middle, last = by_step["lohp"]["mean"]
    assert first == pytest.approx(by_step["teacher_sgd"]["mean"][0], rel=1e-5) and last == 0
    assert middle == pytest.approx(first / 4, rel=1e-5)  # a mean of squares


def test_steps_count_optimizer_steps(drawn):
    ours = drawn["score_by_step"]["lohp"]
    assert ours["step"] == drawn["score_by_step"]["teacher_sgd"]["step"] == [0, 2, 4]
    assert ours["mean"] == [0.0, 1.0, 1.0]  # theta_0 = 0 has no sign
    assert ours["std"] == [0.0, 0.0, 0.0]


def test_steps_in_the_same_direction_have_cosine_one(drawn):
    np.testing.assert_allclose(drawn["cosine"]["lohp"], np.ones(8), atol=1e-5)
    assert set(drawn["cosine"]) == {"lohp"}


def test_only_the_main_walk_is_shown_where_none_spends_gradients(drawn):
    assert set(drawn["score_by_step"]) == {"teacher_sgd", "lohp"}
    assert {p["method"] for p in drawn["projection"]["paths"]} == {"teacher_sgd", "lohp"}


def test_the_main_walk_is_shown_whatever_its_steps(family):
    drawn = draw(family, main="long")
    assert drawn["score_by_step"]["long"]["step"] == [0, 1, 2, 3, 4]
    assert drawn["cosine"] == {}  # another number of steps has no counterpart


def test_gradients_are_spread_over_the_steps(family):
    spends = dataclasses.replace(straight(3), gradients=6)
    by_step = draw(family, cloning=spends)["score_by_step"]
    assert set(by_step) == {"teacher_sgd", "lohp", "cloning"}
    assert by_step["cloning"]["gradients"] == [0, 3, 6]


def test_paths_are_shown_for_both_in_the_same_plane(drawn):
    paths = drawn["projection"]["paths"]
    ours, theirs = (
        np.array(next(p["points"] for p in paths if p["method"] == m and p["task"] == 1))
        for m in ("lohp", "teacher_sgd")
    )
    assert ours.shape == (3, 2)
    np.testing.assert_allclose(ours[0], theirs[0], atol=1e-5)  # both start at theta_0
    step, its = ours[2] - ours[0], theirs[2] - theirs[0]
    assert step @ its == pytest.approx(np.linalg.norm(step) * np.linalg.norm(its), rel=1e-4)
    assert 0 < sum(drawn["projection"]["explained"]) <= 1 + 1e-6
