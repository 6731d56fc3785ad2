"""Plans in words and as JSON lines."""

import json
from dataclasses import replace

from qlm_sim.core.plan import GroupMove, PlanExplanation
from qlm_sim.report.why import plan_lines, plans_jsonl

MOVE = GroupMove(7, "mistral-7b", "interactive", 12, "a10-0", "a100-80-0", 30.25, 4.5, 12.0)
PLAN = PlanExplanation(61.5, 9, 345, 8, kept_cost=11.5, cost=0.25, moves=(MOVE,))


def test_a_plan_says_what_it_expected_and_what_the_alternative_would_have_cost():
    head, move = plan_lines(PLAN)
    assert head == "61.5 s, plan 9: 345 waiting in 8 groups; expected cost 0.25, had nothing moved 11.5"
    assert move.strip() == (
        "group 7 (12 x mistral-7b interactive) goes from a10-0 to a100-80-0: all first tokens expected in "
        "4.5 s instead of 30.2 s, due in 12.0 s"
    )


def test_a_move_on_one_queue_and_an_overdue_one_are_said_so():
    moved = replace(MOVE, target="a10-0", due_s=-3.0)
    _, line = plan_lines(replace(PLAN, moves=(moved,)))
    assert "takes another turn on a10-0" in line
    assert "overdue by 3.0 s" in line


def test_plans_are_one_json_object_a_line(runs):
    lines = plans_jsonl([replace(runs[0], plans=(PLAN, PLAN)), runs[1]]).splitlines()
    assert len(lines) == 2
    plan = json.loads(lines[0])
    assert plan["policy"] == runs[0].name
    assert plan["kept_cost"] == 11.5
    assert plan["moves"][0]["target"] == "a100-80-0"
