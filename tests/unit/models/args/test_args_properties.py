"""What holds for every llmconfig."""

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.models.args.mapping import map_llmconfig, map_prompting
from deployments.models.args.table import DEPLOYMENT, PROMPTING
from registry.errors import InvalidField
from tests.support.llm_args import TAKEN_DEPLOYMENT, TAKEN_PROMPTING, llmconfig

prompting_cases = st.lists(st.sampled_from(TAKEN_PROMPTING), max_size=6).map(lambda cases: {c[0]: c[1] for c in cases})

deployment_cases = st.lists(st.sampled_from(TAKEN_DEPLOYMENT), max_size=6).map(
    lambda cases: {c[0]: c[1] for c in cases}
)

words = st.sampled_from([*PROMPTING, *DEPLOYMENT]) | st.text(max_size=5)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def outcome(config):
    """The result, or the error in words."""
    try:
        return map_llmconfig(config)
    except InvalidField as error:
        return str(error)


@settings(deadline=None)
@given(st.dictionaries(words, json_values, max_size=5), st.dictionaries(words, json_values, max_size=5), st.data())
def test_any_json_maps_or_names_its_fault(prompting, deployment, data):
    """Whatever JSON comes, it maps to strict JSON or raises InvalidField, and its order makes no difference."""
    found = outcome(llmconfig(prompting, deployment))
    if not isinstance(found, str):
        json.dumps([found.prompting, json.loads(found.spec.engine_args)], allow_nan=False)
    shuffled = [dict(data.draw(st.permutations(list(args.items())))) for args in (prompting, deployment)]
    assert outcome(llmconfig(*shuffled)) == found


@settings(deadline=None)
@given(prompting_cases, deployment_cases, st.data())
def test_order_never_matters(prompting, deployment, data):
    """The order of keys changes neither the result nor the error."""
    shuffled = [dict(data.draw(st.permutations(list(args.items())))) for args in (prompting, deployment)]
    assert outcome(llmconfig(*shuffled)) == outcome(llmconfig(prompting, deployment))


@settings(deadline=None)
@given(prompting_cases, deployment_cases)
def test_prompting_never_changes_the_llm(prompting, deployment):
    """Requests that differ in prompting alone share one running LLM."""
    with_it, without = outcome(llmconfig(prompting, deployment)), outcome(llmconfig({}, deployment))
    if not isinstance(with_it, str):
        assert with_it.spec == without.spec


@settings(deadline=None)
@given(prompting_cases)
def test_mapping_again_changes_nothing(prompting):
    """Words of vLLM map to themselves, so that a mapped body can be mapped again."""
    found = outcome(llmconfig(prompting))
    if not isinstance(found, str):
        assert map_prompting(found.prompting).values == found.prompting
