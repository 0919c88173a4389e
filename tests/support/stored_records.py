"""Records for tests of the store: small ones, and ones with the strangest values that they may have."""

from __future__ import annotations

from dataclasses import fields

from registry.core.decision import Changes, Snapshot
from registry.core.records import Lease, LLMMemory, LLMSpec, Machine, Measurement, Request, Wrapper, WrapperStatus
from registry.wire.words import Grade, Priority, RequestStatus

BIGGEST = 2**63 - 1
ODD = "naïve 模型 🌱 \"quoted\" 'single' \\n \n\t %s :name {}"
SPEC = LLMSpec(ODD, "text-generation", revision="main", engine_args='{"dtype":"bfloat16"}', gpus=8)

MACHINE = Machine("m-1", "node", "10.0.0.1")
WRAPPER = Wrapper("w-1", "m-1", "http://10.0.0.1:8000/wrappers/w-1")
MEASUREMENT = Measurement(7, seq=1)
REQUEST = Request("r-1", 7, seq=1, spec=SPEC, llmconfig="{}")
LEASE = Lease("r-1", "w-1", "1", "ab" * 32, granted_s=1.0, deadline_s=2.0, idle_limit_s=3.0, last_active_s=4.0)
SMALL = Snapshot((MACHINE,), (WRAPPER,), (MEASUREMENT,), (REQUEST,), (LEASE,))

EXTREME = Snapshot(
    machines=(
        Machine(
            machine_id=ODD,
            node_id=ODD,
            address=ODD,
            alive=False,
            gpus=16,
            gpu_type=ODD,
            memory_bytes=BIGGEST,
            gpu_memory_bytes=BIGGEST,
            draining=True,
            zone=ODD,
            region=ODD,
        ),
        Machine("", "", ""),
    ),
    wrappers=(
        Wrapper(
            wrapper_id=ODD,
            machine_id=ODD,
            url=ODD,
            gpus=16,
            status=WrapperStatus.LEASED,
            epoch=BIGGEST,
            spec=SPEC,
            request_id=ODD,
            home=LLMSpec("", ""),
            last_used_s=1.7e9 + 1e-6,
            failures=2**31 - 1,
            reason=ODD * 10_000,
        ),
        Wrapper("", "", ""),
    ),
    measurements=(
        Measurement(
            BIGGEST,
            BIGGEST,
            ODD,
            Priority.HIGH,
            ODD,
            (ODD, "", "machine_changed"),
            1.7e9 + 1e-6,
            ODD,
            ODD,
            1.7e9 + 1e-6,
        ),
        Measurement(1, 0),
        Measurement(1, 0, "another"),
    ),
    requests=(
        Request(
            request_id=ODD,
            measurement_id=BIGGEST,
            seq=BIGGEST,
            spec=SPEC,
            llmconfig=ODD * 10_000,
            status=RequestStatus.DEPLOYED,
            reason=ODD * 10_000,
            notes=(ODD, ""),
            wrapper_id=ODD,
            machine_id=ODD,
            failed_on=("gone", ODD),
            overtaken=2**31 - 1,
            created_s=0.1,
            deploying_s=0.2,
            deployed_s=0.3,
            ended_s=0.4,
            memory=LLMMemory(BIGGEST, BIGGEST, 2**31 - 1, 1e-3, 16),
            max_j=1e15,
            max_g=1e-300,
            model_revision=ODD,
            grade=Grade.MEASUREMENT,
            like_request_id=ODD,
            provenance=ODD * 10_000,
            tenant=ODD,
        ),
        Request("", 1, 0, LLMSpec("", ""), ""),
    ),
    leases=(Lease(ODD, ODD, ODD, ODD, 1e-300, 1e300, float("inf"), -0.5), Lease("", "", "", "", 0.0, 0.0, 0.0, 0.0)),
)


def changes(snapshot: Snapshot, **removed: tuple[str, ...]) -> Changes:
    """The changes that put everything of a snapshot."""
    return Changes(
        snapshot.machines, snapshot.wrappers, snapshot.measurements, snapshot.requests, snapshot.leases, **removed
    )


def as_sets(snapshot: Snapshot) -> dict[str, set[object]]:
    """A snapshot without its meaningless order; fails when a record occurs twice."""
    kinds = {field.name: getattr(snapshot, field.name) for field in fields(snapshot)}
    assert all(len(set(records)) == len(records) for records in kinds.values())
    return {kind: set(records) for kind, records in kinds.items()}
