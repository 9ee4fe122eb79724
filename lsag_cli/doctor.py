"""lsag doctor"""

from dataclasses import asdict
from typing import Annotated

import typer

from lsag.config import default_data_dir
from lsag.errors import UnavailableError
from lsag.inference.doctor import Purpose
from lsag.runs import RUNS
from lsag_cli.options import DataDir, Json, loading
from lsag_cli.output import erase_status, print_json, say, show_status


def doctor(
    purpose: Annotated[
        Purpose | None,
        typer.Option("--for", help="Exit with code 4 if this will not work here."),
    ] = None,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Check what works here, and how to fix the rest: Python, torch, GPUs, onnxruntime, datasets, disk."""
    with loading("examining this machine"):
        from lsag.inference.doctor import examine

        findings = []
        for finding in examine(data_dir or default_data_dir("folder"), RUNS):
            findings.append(finding)
            if not as_json:
                concerns = (purpose or "train") in finding.prevents
                erase_status()
                say(f"{'!' if finding.problem and concerns else ' '} {finding.name:26} {finding.value}")
                show_status("examining this machine ...")
    error = None
    if first := next((finding for finding in findings if purpose in finding.prevents), None):
        error = UnavailableError(f"{purpose} will not work here: {first.name}: {first.problem}", first.fix)
    if as_json:
        shown = [asdict(finding) for finding in findings]
        failed = {"error": {"code": error.exit_code, "message": str(error)}} if error else {}
        print_json("doctor", purpose=purpose, findings=shown, **failed)
    else:
        for finding in findings:
            if finding.problem and finding.fix:
                scope = " (only for inference on a GPU)" if finding.prevents == ("gpu-inference",) else ""
                say(f"{finding.name}: {finding.problem}{scope} — {finding.fix}")
    if error:
        raise error
