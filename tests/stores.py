"""Small artifacts in a store, and what a run folder shows of them."""

from pipeline.runtime.run_folder import Shown

FACTS = {"settings": {"tokens": 3}, "inputs": {}, "seconds": 1.5, "peak_memory": 10}


def make(store, stage="score", key="a" * 12, text="content", inputs=()):
    with store.open(stage, key) as partial:
        (partial / "inner").mkdir(exist_ok=True)
        (partial / "scores.txt").write_text(text)
        (partial / "inner" / "more.txt").write_text("more")
        return store.publish(stage, key, **{**FACTS, "inputs": {str(i): name for i, name in enumerate(inputs)}})


def exported(store, key="e" * 12, text="weights", size=0):
    with store.open("export", key) as partial:
        (partial / "config.json").write_text("{}")
        (partial / "model.safetensors").write_text(text + "x" * size)
        return store.publish("export", key, **FACTS)


def linked(folder, inside=""):
    return Shown(folder, inside)


def student(folder):
    return {"student": Shown(folder, "", delivered=True)}


def of(*folders):
    """Return the record of a run that made these artifacts."""
    return {"stages": {folder.name.split("-")[0]: {"artifact": folder.name} for folder in folders}}
