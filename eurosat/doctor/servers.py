"""Checks of the platform's servers: they answer, know us, agree with each other and the time."""

import time
from importlib import metadata
from typing import Any

from eurosat.doctor.checks import Failed, NotApplicable
from eurosat.doctor.context import Answer, Visit

API = "/api/2.0/mlflow"
MODEL, CHAMPION = "eurosat", "champion"
WEBHOOK = "eurosat-registry"
"""The name of that which `python -m registry.webhooks install` makes."""
SWAP_S, LOOK_S = 10.0, 0.5
"""That serving has to answer with a new champion, and between two looks."""
DELIVERY_S = 20.0
"""MLflow tries a delivery several times before it says how that went."""
SKEW_S = 5.0
"""Times of metrics are the client's, those of webhooks may differ by 300 s: well before that."""
ACCOUNT = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD to an account of this server"


def reachable(visit: Visit) -> str:
    server = visit.tracking
    started = time.monotonic()
    answer = server.ask("GET", "/health")
    if not answer.ok:
        raise Failed(f"{server.url}/health answers {answer.said()}", server.remedy)
    return f"{server.url} answers in {(time.monotonic() - started) * 1000:.0f} ms"


def version(visit: Visit) -> str:
    """Releases of one minor version talk to each other."""
    ours, answer = metadata.version("mlflow"), visit.tracking.ask("GET", "/version")
    theirs = answer.body.decode("utf-8", "replace").strip()
    if not answer.ok or not theirs[:1].isdigit():
        raise Failed(
            f"{visit.tracking.url}/version answers {answer.said()}: that is no MLflow server",
            "let MLFLOW_TRACKING_URI name one",
        )
    if theirs.split(".")[:2] != ours.split(".")[:2]:
        raise Failed(
            f"MLflow {ours} here, {theirs[:20]} on the server",
            f"run MLflow {ours} there, as the locks and deploy/mlflow have it",
        )
    return f"MLflow {ours} here, {theirs} on the server"


def credentials(visit: Visit) -> str:
    """Who we are there; a server without accounts is asked for something that any answers."""
    server = visit.tracking
    answer = server.ask("GET", f"{API}/users/current")
    if answer.status == 404:
        answer = server.ask("POST", f"{API}/experiments/search", json={"max_results": 1})
        if answer.ok:
            visit.known = True
            return "the server asks for none"
    if answer.status == 403 and b"Invalid Host" in answer.body:
        raise Failed(
            f"{server.url}: {answer.said()}", "start the server with --allowed-hosts and that name"
        )
    if answer.status in (401, 403):
        given = "refused" if server.auth else "asked for, and none are set"
        raise Failed(f"credentials are {given} ({answer.status})", ACCOUNT)
    if not answer.ok:
        raise Failed(f"{server.url} answers {answer.said()}", "look into the server's log")
    told: dict[str, Any] = answer.json().get("user") or {}
    visit.known, visit.user = True, str(told.get("username", ""))
    return f"{visit.user or 'an account'}{', an administrator' if told.get('is_admin') else ''}"


def webhook(visit: Visit) -> str:
    """MLflow sends the promoter an example, and tells how that was answered."""
    server = visit.tracking
    answer = server.ask("GET", f"{API}/webhooks")
    if answer.status == 403:
        raise NotApplicable(f"webhooks are shown to administrators alone, not to {visit.user}")
    if not answer.ok:
        raise Failed(f"webhooks cannot be listed: {answer.said()}", "look into the server's log")
    hooks = [one for one in answer.json().get("webhooks", []) if one["name"] == WEBHOOK]
    if not hooks:
        raise NotApplicable("no webhook: `python -m registry.webhooks install URL` makes it")
    url = hooks[0]["url"]
    if hooks[0].get("status") == "DISABLED":
        raise Failed(f"the webhook to {url} is disabled", "`python -m registry.webhooks install`")
    tried = server.ask(
        "POST", f"{API}/webhooks/{hooks[0]['webhook_id']}/test", json={}, timeout_s=DELIVERY_S
    )
    result: dict[str, Any] = tried.json().get("result") or {}
    if not tried.ok or not result.get("success"):
        status = result.get("response_status", 0)
        why = result.get("error_message") or f"{status} {result.get('response_body', '')}"
        raise Failed(
            f"{url} did not take a delivery: {why if tried.ok else tried.said()}"[:400],
            "give MLflow and the receiver one MLFLOW_WEBHOOK_SECRET: install the webhook anew"
            if status == 401
            else "start `python -m registry.receiver` where the webhook's URL points",
        )
    return f"{url} took an example ({result['response_status']})"


def promoter(visit: Visit) -> str:
    server = visit.promoter
    server.url = server.url.removesuffix("/webhook")
    answer = server.ask("GET", "/health")
    counts = answer.json()
    if not answer.ok or "waiting" not in counts:
        raise Failed(f"{server.url}/health answers {answer.said()}", server.remedy)
    dead = counts.get("dead", 0)
    why = f" ({server.url}/dead tells why)" if dead else ""
    return f"{server.url}: {counts['waiting']} deliveries wait, {dead} were given up{why}"


def serving(visit: Visit) -> str:
    """The version that answers is the champion, if need be after a moment."""
    server, deadline = visit.serving, time.monotonic() + SWAP_S
    answers = serves(server.ask("GET", "/ready"), server.url)
    try:
        wanted = champion(visit)
    except NotApplicable as why:
        told = f"version {answers} answers" if answers else "no version is served"
        return f"{told}; not compared: {why}"
    while answers != wanted and time.monotonic() < deadline:
        time.sleep(LOOK_S)
        answers, wanted = serves(server.ask("GET", "/ready"), server.url), champion(visit)
    if answers != wanted:
        told = f"answers with version {answers}" if answers else "serves no version"
        raise Failed(
            f"{server.url} {told}, the champion is {wanted}",
            f"{server.url}/model tells what it follows and refused, its log why",
        )
    return f"version {answers}, the champion, answers"


def serves(answer: Answer, url: str) -> str | None:
    """The version that answers; None while a server has none."""
    if answer.status == 503:
        return None
    told = answer.json()
    if not answer.ok or "model_version" not in told:
        raise Failed(
            f"{url}/ready answers {answer.said()}: that is no `python -m serving.server`",
            "let EUROSAT_SERVING_URL name one",
        )
    return str(told["model_version"])


def champion(visit: Visit) -> str:
    """The champion's version.

    Raises:
        NotApplicable: there is none, or none that we may see.
    """
    server, given = visit.tracking, {"name": MODEL, "alias": CHAMPION}
    if not visit.known:
        raise NotApplicable(f"{server.url} does not answer us")
    answer = server.ask("GET", f"{API}/registered-models/alias", params=given)
    if answer.status in (400, 404):
        raise NotApplicable(f"{MODEL} has no {CHAMPION} yet")
    if answer.status in (401, 403):
        raise NotApplicable(f"{visit.user or 'who has no account'} sees no {MODEL}@{CHAMPION}")
    if not answer.ok:
        raise Failed(f"{MODEL}@{CHAMPION}: {answer.said()}", "look into the server's log")
    return str(answer.json()["model_version"]["version"])


def clock(visit: Visit) -> str:
    """Ours against the Date of the servers' latest answers, which is known to half a second."""
    ahead = {one.name: one.ahead_s for one in visit.asked() if one.ahead_s is not None}
    if not ahead:
        raise NotApplicable("no server has told its time")
    told = ", ".join(f"{name} {by:+.1f} s" for name, by in ahead.items())
    if max(map(abs, ahead.values())) > SKEW_S:
        raise Failed(
            f"clocks differ from ours: {told}; {SKEW_S:g} s are allowed",
            "let NTP set both (`timedatectl set-ntp true`)",
        )
    return f"{told} from ours"
