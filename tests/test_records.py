import tiny
from tuners import plan_of

import memplan


def test_what_is_printed_is_told_in_words() -> None:
    plan = plan_of(1.0)
    assert str(plan) == plan.describe()
    assert repr(plan) == f"<Plan: {plan.describe().splitlines()[0]}>"
    model, batch = tiny.llama(layers=1)
    found = memplan.predict(model, batch)
    assert str(found) == found.describe()
    assert repr([found]).startswith("[<Prediction: peak ")
