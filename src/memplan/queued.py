"""Plans as trials of an Optuna study that wait: how the study and each of them keep what there is to know."""

import zlib
from base64 import b85decode, b85encode
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from memplan.plan_record import Plan

if TYPE_CHECKING:
    from memplan.trials import Candidate

MADE_FOR, QUEUED, WHOLE = "memplan made for", "memplan queued", "memplan budget_bytes"  # attributes of the study
PLAN = "plan"  # and of a trial


def fill(study: optuna.Study, made_for: Mapping[str, object], queue: "Sequence[Candidate]") -> None:
    """Put plans into a new study, the last sign of which is their number."""
    study.set_user_attr(MADE_FOR, dict(made_for))
    study.set_user_attr(WHOLE, max(one.whole_bytes for one in queue))
    settings = [one.settings for one in queue]
    distributions: dict[str, BaseDistribution] = {
        name: CategoricalDistribution(sorted({some[name] for some in settings})) for name in settings[0]
    }
    for one in queue:
        study.add_trial(queued(one.settings, distributions, {PLAN: packed(one.plan)}))
    study.set_user_attr(QUEUED, len(queue))


def packed(plan: Plan) -> str:
    """A plan as a text for a database, of which some take no more than 64 KiB: 126 blocks make 150, packed 14 KiB."""
    return b85encode(zlib.compress(plan.model_dump_json().encode())).decode()


def unpacked(text: str) -> Plan:
    """What `packed` has made a text of."""
    return Plan.model_validate_json(zlib.decompress(b85decode(text)))


def queued(
    params: dict[str, Any], distributions: dict[str, BaseDistribution], attributes: dict[str, Any]
) -> FrozenTrial:
    """A trial that waits."""
    return create_trial(state=TrialState.WAITING, params=params, distributions=distributions, user_attrs=attributes)
