"""Random requests made from the OpenAPI schema: none may be a server error."""

from __future__ import annotations

import warnings

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from support.serving import Live, live

pytestmark = pytest.mark.slow
TIMEOUT = 504  # random requests ask for thousands of tokens


@pytest.mark.filterwarnings("ignore")
def test_no_request_of_the_schema_is_a_server_error(server: Live) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import schemathesis

    with live(server.engine, request_timeout=0.3) as running:
        schema = schemathesis.openapi.from_url(f"{running.url}/openapi.json")
        seen: dict[str, set[int]] = {}
        for result in schema.get_all_operations():
            operation = result.ok()

            @settings(
                max_examples=40,
                deadline=None,
                derandomize=True,
                database=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @given(case=operation.as_strategy())
            def check(case: schemathesis.Case) -> None:
                answer = case.call(base_url=running.url)
                seen.setdefault(case.path, set()).add(answer.status_code)
                assert answer.status_code < 500 or answer.status_code == TIMEOUT, answer.text
                if answer.status_code >= 400:
                    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}

            check()
        assert 400 in seen["/v1/completions"]
        assert seen["/v1/completions"] & {200, TIMEOUT}
        assert 200 in seen["/tokenize"]
        running.wait_idle()
