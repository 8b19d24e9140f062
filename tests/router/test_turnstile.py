import asyncio

from router.turnstile import PER_TURN, Turnstile


async def test_a_few_go_on_per_turn_in_the_order_in_which_they_came() -> None:
    turnstile = Turnstile()
    loop = asyncio.get_running_loop()
    waiters = [loop.create_future() for _ in range(2 * PER_TURN + 1)]
    for waiter in waiters:
        turnstile.admit(waiter)
    gone = []
    for _ in range(3):
        await asyncio.sleep(0)
        gone.append(sum(waiter.done() for waiter in waiters))
        assert all(waiter.done() for waiter in waiters[: gone[-1]])
    assert gone == [PER_TURN, 2 * PER_TURN, 2 * PER_TURN + 1]


async def test_a_waiter_whose_consumer_was_cancelled_holds_nobody_up() -> None:
    turnstile = Turnstile()
    cancelled, other = (asyncio.get_running_loop().create_future() for _ in range(2))
    turnstile.admit(cancelled)
    turnstile.admit(other)
    cancelled.cancel()
    await asyncio.wait_for(other, timeout=10)
