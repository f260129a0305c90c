"""The paper's tables by one command, on your own checkpoint: `python -m benchmarks.tables --help`.

    experiments.toml   which rows each table has: a row is a name and the settings of the nodes
    prompts.py         prompt files as they are published
    graph.py           a row and a case as nodes of ComfyUI
    comfyui.py         runs nodes: ComfyUI in this process, or a server
    judges.py          what is read from a picture, each by a well-kept library
    run.py             sampling that can be stopped at any moment and goes on
    tiny.py            the shipped tiny world as a checkpoint, with its pictures and its judge
    result.py, page.py the table, and the page to look at the pictures
"""
