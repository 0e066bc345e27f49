"""Who the records of the registry name."""

from eurosat import tracking


def actor(by: str | None = None) -> str:
    """Return the account that the server has authenticated, or else this machine's user.

    ``by`` is another person's name: it is recorded beside the account. A server without accounts
    can check no name, so ``by`` alone is recorded there.
    """
    account = tracking.account()
    name = account or tracking.user()
    if by is None or by == name:
        return name
    return f"{account} on behalf of {by}" if account else by
