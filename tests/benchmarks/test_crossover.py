from benchmarks.gpu.crossover import crossover


def test_it_is_the_last_length_before_the_first_that_is_better_handed_over() -> None:
    handed_over = {32: 10.0, 64: 11.0, 128: 12.0, 256: 14.0}
    assert crossover({256: 20.0, 32: 8.0, 64: 11.0, 128: 13.0}, handed_over) == 64
    assert crossover({32: 8.0, 64: 12.0, 128: 11.0, 256: 13.0}, handed_over) == 32, "later luck does not count"
    assert crossover(dict.fromkeys(handed_over, 9.0), handed_over) == 256
    assert crossover(dict.fromkeys(handed_over, 99.0), handed_over) is None
