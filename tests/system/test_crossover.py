"""Does the curve say from which length on sparse attention is faster, and is it drawn?"""

from experiments.benchmarks import crossover


def row(length, batch, ours, full, **others):
    times = {"triton": ours, "cudnn: causal": full, **others}
    contenders = [{"name": name, "best": time} for name, time in times.items()]
    return {"case": f"{length}-backward", "shape": f"B {batch}, T {length}, H 32", "contenders": contenders}


def test_curve_and_crossover(tmp_path):
    rows = [row(4096, 1, 1.2, 1.0), row(1024, 4, 0.4, 0.5), row(8192, 1, 1.9, 2.0)]
    rows.append(row(16384, 1, 2.0, 4.0, fla=5.0, **{"cudnn: window": 1.0}))
    earlier = row(1024, 4, 9.0, 9.0, fla=0.6, **{"cudnn: window": 0.2})
    rows.append({**earlier, "case": "1024-beside-fla-backward"})
    rows += [{**row(8192, 1, 9.0, 1.0), "case": name} for name in ("8192-forward", "group-4-backward", "decode-16")]
    points = crossover.curve(rows)
    assert list(points) == [1024, 4096, 8192, 16384]
    assert points[1024] == (100.0, 125.0, 200.0) and points[4096][2] is None and points[16384] == (125.0, 250.0, 375.0)
    assert crossover.crossover(points) == 8192
    assert crossover.crossover({1024: (1.0, 2.0, None), 2048: (2.0, 1.0, 5.0)}) is None
    crossover.draw(points, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 5000
