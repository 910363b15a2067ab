"""The files in examples/serving name options and packages that exist."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from specplug.cli.main import cli
from specplug.server import metrics

pytestmark = pytest.mark.unit
ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "serving"


def parsed(words: list[str]) -> dict[str, Any]:
    """The options of `specplug serve`, checked as the command checks them."""
    command = cli.get_command(click.Context(cli), "serve")
    assert command is not None
    return command.make_context("serve", words).params


def test_the_unit_file_starts_a_server_on_the_socket_of_nginx() -> None:
    (line,) = [
        line for line in (EXAMPLES / "specplug.service").read_text().splitlines() if line.startswith("ExecStart=")
    ]
    program, command, *words = shlex.split(line.removeprefix("ExecStart="))
    assert (Path(program).name, command) == ("specplug", "serve")
    options = parsed(words)
    assert f"server unix:{options['uds']};" in (EXAMPLES / "nginx.conf").read_text()


def test_the_image_installs_the_extra_and_the_compose_file_starts_it() -> None:
    text = (EXAMPLES / "Dockerfile").read_text()
    extra = tomllib.loads((ROOT / "core" / "pyproject.toml").read_text())["project"]["optional-dependencies"]["serve"]
    assert [name for name in extra if f'"{name}"' not in text] == []
    services = yaml.safe_load((EXAMPLES / "compose.yaml").read_text())["services"]
    assert parsed(services["specplug"]["command"])["host"] == "0.0.0.0"
    mounted = [path.split(":")[0] for service in services.values() for path in service.get("volumes", [])]
    assert [path for path in mounted if path.startswith(".") and not (EXAMPLES / path).exists()] == []


def test_the_dashboard_shows_metrics_that_are_served() -> None:
    shown = set(re.findall(r"(?:vllm|specplug):[a-z0-9_]+", (EXAMPLES / "grafana" / "dashboard.json").read_text()))
    names = {re.sub("_(total|bucket|sum|count)$", "", name) for name in shown}
    assert len(names) > 5
    served = Path(metrics.__file__).read_text()
    assert [name for name in sorted(names) if f'"{name}"' not in served] == []
