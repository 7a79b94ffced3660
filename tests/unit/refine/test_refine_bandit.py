"""Where nothing better comes for a while, the bandit looks along the lines through the best config."""

import itertools

import numpy as np

from agnitra_lab.contracts.search import KernelConfig, SearchSpace
from agnitra_lab.refine.bandit import LINE_TURN, NUM_PATIENT_LINES, Bandit
from agnitra_lab.refine.sampler import Observation, Problem
from agnitra_lab.refine.space import Encoding


def asked_after_a_best_one_that_stays(num_questions: int) -> tuple[Encoding, list[int]]:
    """Let every config after the first be slower than it, the more so the later it is asked for."""
    params = {"a": (1, 2, 4, 8), "b": (1, 2, 4, 8), "c": (1, 2, 4, 8), "d": (1, 2, 3)}
    configs = tuple(
        KernelConfig(template="synthetic", params=dict(zip(params, values, strict=True)))
        for values in itertools.product(*params.values())
    )
    encoding = Encoding(SearchSpace(template="synthetic", shape=(1,), dtype="float32", params=params, configs=configs))
    bandit = Bandit(Problem("rl", encoding, seed=3))
    is_open, asked = np.ones(len(encoding), dtype=bool), []
    for index in range(num_questions):
        (arm,) = bandit.propose(1, is_open)
        is_open[arm] = False
        asked.append(int(arm))
        bandit.learn(Observation(arm=arm, log_ms=0.0 if index == 0 else 0.1 + 0.01 * index))
    return encoding, asked


def test_every_other_question_changes_one_parameter_of_a_best_config_that_stays_best() -> None:
    encoding, asked = asked_after_a_best_one_that_stays(NUM_PATIENT_LINES + 8)
    lines = set(encoding.on_same_lines(asked[0]).tolist())
    turns = [index for index in range(NUM_PATIENT_LINES + 1, len(asked)) if (index + 1) % LINE_TURN == 0]
    assert turns and all(asked[index] in lines for index in turns)


def test_no_config_is_asked_for_twice_once_the_lines_are_used_up() -> None:
    _, asked = asked_after_a_best_one_that_stays(60)
    assert len(set(asked)) == len(asked)
