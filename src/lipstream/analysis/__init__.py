"""The teacher's trajectory: where audio guidance buys synchronisation, what it costs, and where a second call lands.

`study` samples and scores, `curves` averages over clips, `derive` is the rule that turns curves into the guidance
window and the landing step, `figures` draws them, `pocket` makes clips of prepared samples.

    lipstream analyze --model teacher.safetensors --samples DIR -o OUT
"""
