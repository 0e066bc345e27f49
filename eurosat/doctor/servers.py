"""Checks of the platform's servers: reachable, same version, credentials, champion, clock."""

import time
from importlib import metadata
from typing import Any

from eurosat.doctor.context import DoctorContext
from eurosat.doctor.findings import Failed, NotApplicable
from eurosat.doctor.http import Answer

API = "/api/2.0/mlflow"
MODEL, CHAMPION = "eurosat", "champion"
WEBHOOK = "eurosat-registry"
"""Name of the webhook that `python -m registry.webhooks install` creates."""
SWAP_TIMEOUT_S, POLL_INTERVAL_S = 10.0, 0.5
"""How long serving may take to answer with a new champion, and how often that is checked."""
DELIVERY_TIMEOUT_S = 20.0
"""MLflow tries a delivery several times before it reports the result."""
MAX_CLOCK_SKEW_S = 5.0
"""Far below the 300 s that webhooks allow, and small against a run: metrics carry our time."""
SET_ACCOUNT = (
    "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD to an account of this server"
)
READ_LOG = "look into the server's log"


def reachable(context: DoctorContext) -> str:
    server = context.tracking
    started = time.monotonic()
    answer = server.request("GET", "/health")
    if not answer.ok:
        raise Failed(f"{server.url}/health answers {answer.summary()}", server.remedy)
    return f"{server.url} answers in {(time.monotonic() - started) * 1000:.0f} ms"


def version(context: DoctorContext) -> str:
    """Compare MLflow's versions: releases of one minor version are compatible."""
    server, ours = context.tracking, metadata.version("mlflow")
    answer = server.request("GET", "/version")
    theirs = answer.body.decode("utf-8", "replace").strip()
    if not answer.ok or not theirs[:1].isdigit():
        raise Failed(
            f"{server.url}/version answers {answer.summary()}: this is not an MLflow server",
            "set MLFLOW_TRACKING_URI to an MLflow server",
        )
    if theirs.split(".")[:2] != ours.split(".")[:2]:
        raise Failed(
            f"MLflow {ours} here, {theirs[:20]} on the server",
            f"run MLflow {ours} there, as the locks and deploy/mlflow have it",
        )
    return f"MLflow {ours} here, {theirs} on the server"


def credentials(context: DoctorContext) -> str:
    """Authenticate, and return who we are; a server without accounts accepts everybody."""
    server = context.tracking
    answer = server.request("GET", f"{API}/users/current")
    if answer.status == 404:
        answer = server.request("POST", f"{API}/experiments/search", json={"max_results": 1})
        if answer.ok:
            context.authenticated = True
            return "the server asks for no credentials"
    if answer.status == 403 and b"Invalid Host" in answer.body:
        raise Failed(
            f"{server.url}: {answer.summary()}",
            "start the server with --allowed-hosts and that name",
        )
    if answer.status in (401, 403):
        state = "refused" if server.auth else "required, and none are set"
        raise Failed(f"credentials are {state} ({answer.status})", SET_ACCOUNT)
    if not answer.ok:
        raise Failed(f"{server.url} answers {answer.summary()}", READ_LOG)
    user: dict[str, Any] = answer.json().get("user") or {}
    context.authenticated, context.username = True, str(user.get("username", ""))
    return (
        f"{context.username or 'an account'}{', an administrator' if user.get('is_admin') else ''}"
    )


def webhook(context: DoctorContext) -> str:
    """Let MLflow send the promoter an example, and return how the promoter answered."""
    server = context.tracking
    answer = server.request("GET", f"{API}/webhooks")
    if answer.status == 403:
        raise NotApplicable(f"only administrators see webhooks, and {context.username} is none")
    if not answer.ok:
        raise Failed(f"webhooks cannot be listed: {answer.summary()}", READ_LOG)
    hooks = [hook for hook in answer.json().get("webhooks", []) if hook["name"] == WEBHOOK]
    if not hooks:
        raise NotApplicable("no webhook: `python -m registry.webhooks install URL` creates it")
    url = hooks[0]["url"]
    if hooks[0].get("status") == "DISABLED":
        raise Failed(
            f"the webhook to {url} is disabled", "run `python -m registry.webhooks install`"
        )
    path = f"{API}/webhooks/{hooks[0]['webhook_id']}/test"
    answer = server.request("POST", path, json={}, timeout_s=DELIVERY_TIMEOUT_S)
    result: dict[str, Any] = answer.json().get("result") or {}
    if not answer.ok or not result.get("success"):
        raise _delivery_failed(url, answer, result)
    return f"{url} accepted an example ({result['response_status']})"


def _delivery_failed(url: str, answer: Answer, result: dict[str, Any]) -> Failed:
    """Return the failure for a delivery that MLflow reports in ``result``."""
    status = result.get("response_status", 0)
    reason = result.get("error_message") or f"{status} {result.get('response_body', '')}"
    if not answer.ok:
        reason = answer.summary()
    remedy = "start `python -m registry.receiver` where the webhook's URL points"
    if status == 401:
        remedy = (
            "MLflow and the receiver need the same MLFLOW_WEBHOOK_SECRET: set it, and run "
            "`python -m registry.webhooks install` again"
        )
    return Failed(f"{url} did not accept a delivery: {reason}"[:400], remedy)


def promoter(context: DoctorContext) -> str:
    server = context.promoter
    server.url = server.url.removesuffix("/webhook")
    answer = server.request("GET", "/health")
    counts = answer.json()
    if not answer.ok or "waiting" not in counts:
        raise Failed(f"{server.url}/health answers {answer.summary()}", server.remedy)
    dead = counts.get("dead", 0)
    hint = f" (reasons: {server.url}/dead)" if dead else ""
    return f"{server.url}: {counts['waiting']} deliveries wait, {dead} were given up{hint}"


def serving(context: DoctorContext) -> str:
    """Compare the served version with the champion; wait for a swap that may be under way."""
    server, deadline = context.serving, time.monotonic() + SWAP_TIMEOUT_S
    served = served_version(server.request("GET", "/ready"), server.url)
    try:
        expected = champion_version(context)
    except NotApplicable as reason:
        state = f"version {served} answers" if served else "no version is served"
        return f"{state}; not compared: {reason}"
    while served != expected and time.monotonic() < deadline:
        time.sleep(POLL_INTERVAL_S)
        served = served_version(server.request("GET", "/ready"), server.url)
        expected = champion_version(context)
    if served != expected:
        state = f"answers with version {served}" if served else "serves no version"
        raise Failed(
            f"{server.url} {state}, the champion is {expected}",
            f"{server.url}/model shows which versions it follows and refused, its log the reason",
        )
    return f"version {served}, the champion, answers"


def served_version(answer: Answer, url: str) -> str | None:
    """Return the version in an answer of /ready; None if the server has no version yet."""
    if answer.status == 503:
        return None
    payload = answer.json()
    if not answer.ok or "model_version" not in payload:
        raise Failed(
            f"{url}/ready answers {answer.summary()}: this is not `python -m serving.server`",
            "set EUROSAT_SERVING_URL to one",
        )
    return str(payload["model_version"])


def champion_version(context: DoctorContext) -> str:
    """Return the champion's version.

    Raises:
        NotApplicable: there is no champion, or this account cannot see it.
    """
    server, key = context.tracking, {"name": MODEL, "alias": CHAMPION}
    if not context.authenticated:
        raise NotApplicable(f"{server.url} has not accepted our credentials")
    answer = server.request("GET", f"{API}/registered-models/alias", params=key)
    if answer.status in (400, 404):
        raise NotApplicable(f"{MODEL} has no {CHAMPION} yet")
    if answer.status in (401, 403):
        account = context.username or "an anonymous user"
        raise NotApplicable(f"{account} cannot see {MODEL}@{CHAMPION}")
    if not answer.ok:
        raise Failed(f"{MODEL}@{CHAMPION}: {answer.summary()}", READ_LOG)
    return str(answer.json()["model_version"]["version"])


def clock(context: DoctorContext) -> str:
    """Compare our clock with the Date of the servers' latest answers, known to half a second."""
    offsets = {
        server.name: server.clock_offset_s
        for server in context.contacted_servers()
        if server.clock_offset_s is not None
    }
    if not offsets:
        raise NotApplicable("no server has sent its time")
    listing = ", ".join(f"{name} {offset:+.1f} s" for name, offset in offsets.items())
    if max(map(abs, offsets.values())) > MAX_CLOCK_SKEW_S:
        raise Failed(
            f"clocks differ from ours: {listing}; {MAX_CLOCK_SKEW_S:g} s are allowed",
            "let NTP set both (`timedatectl set-ntp true`)",
        )
    return f"{listing} from ours"
