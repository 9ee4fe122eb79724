"""lsag doctor"""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from lsag.errors import UnavailableError
from lsag_cli.options import DataDir, Json, data_dir_or_default, leaving_at_once
from lsag_cli.output import print_json, say


def doctor(
    purpose: Annotated[
        Literal["train", "gpu-inference"] | None,
        typer.Option("--for", help="End with exit code 4 if this will not work here."),
    ] = None,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Say what works on this machine: Python, torch, GPUs, onnxruntime and its providers, datasets, disk."""
    with leaving_at_once():
        from lsag.inference.doctor import examine

        findings = []
        for finding in examine(data_dir_or_default(data_dir), Path("runs")):
            findings.append(finding)
            if not as_json:
                concerns = purpose in finding.prevents if purpose else "train" in finding.prevents
                say(f"{'!' if finding.problem and concerns else ' '} {finding.name:26} {finding.value}")
    wrong = [finding for finding in findings if purpose in finding.prevents]
    error = None
    if wrong:
        first = wrong[0]
        error = UnavailableError(f"{purpose} will not work here: {first.name}: {first.problem}", first.fix)
    if as_json:
        shown = [asdict(finding) for finding in findings]
        failed = {"error": {"code": error.exit_code, "message": str(error)}} if error else {}
        print_json("doctor", purpose=purpose, findings=shown, **failed)
    else:
        for finding in findings:
            if finding.problem and finding.fix:
                for_whom = " (matters on a GPU only)" if finding.prevents == ("gpu-inference",) else ""
                say(f"{finding.name}: {finding.problem}{for_whom} — {finding.fix}")
    if error:
        raise error
