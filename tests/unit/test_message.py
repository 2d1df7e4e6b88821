"""Documents between farpage's own processes."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from farpage.definition.states import ReplicaState
from farpage.message import encode
from farpage.pager.messages import EndpointSpec, Query, RecordReplicas, ReplicaSpec, SetLimit

SPEC = ReplicaSpec(
    device="d1", name="disk", state=ReplicaState.STALE, endpoints=(EndpointSpec(vios="v", address="unix:/s"),)
)


def test_a_message_is_the_same_after_its_way_as_json() -> None:
    assert ReplicaSpec.model_validate_json(SPEC.model_dump_json().encode()) == SPEC
    record = RecordReplicas(client="vm", owner="o", epoch=3, states={"d1": ReplicaState.IN_SYNC})
    assert RecordReplicas.model_validate(msgspec.json.decode(encode(record))) == record


def test_a_copy_differs_in_what_is_named() -> None:
    copy = SPEC.model_copy(update={"state": ReplicaState.IN_SYNC})
    assert (copy.state, copy.endpoints, SPEC.state) == (
        ReplicaState.IN_SYNC,
        SPEC.endpoints,
        ReplicaState.STALE,
    )


def test_numbers_of_numpy_are_numbers() -> None:
    found = SetLimit.model_validate_json(encode({"client": "vm", "limit_pages": np.int64(5)}))
    assert found == SetLimit(client="vm", limit_pages=5)


@pytest.mark.parametrize("document", [{}, {"client": 1}, {"client": "vm", "more": 1}, {"client": None}])
def test_another_document_is_refused(document: object) -> None:
    with pytest.raises(msgspec.ValidationError):
        Query.model_validate(document)
    with pytest.raises(msgspec.ValidationError):
        SetLimit.model_validate({"client": "vm", "limit_pages": 0})
