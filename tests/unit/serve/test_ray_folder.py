"""The copy of a failed cluster's logs."""

from __future__ import annotations

import stat
from pathlib import Path

from deployments.serve.ray_folder import keep_logs


def test_kept_logs_are_their_owners_even_if_some_can_not_be_copied(tmp_path: Path) -> None:
    """Ray opens its folder of logs to all users; the copy's folder is closed, and a log that is gone stops nothing."""
    logs = tmp_path / "cluster" / "r" / "session_2026-11-29" / "logs"
    logs.mkdir(parents=True)
    logs.chmod(0o777)
    (logs / "raylet.err").write_text("the whole story")
    (logs / "gone").symlink_to(tmp_path / "nowhere")
    kept = tmp_path / "state" / "ray-logs"
    kept.mkdir(parents=True)
    kept.chmod(0o777)
    (kept / "old").touch()
    assert keep_logs(tmp_path / "cluster", kept) == kept
    assert stat.S_IMODE(kept.stat().st_mode) == 0o700
    assert [path.name for path in kept.rglob("*") if path.is_file()] == ["raylet.err"]
