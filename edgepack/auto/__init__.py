"""Deciding between bits, depth and width: `edgepack build --auto`.

    bits alone: are all budgets met, measured?
    -> could any pruned model be closer to the source at the same budgets?
    -> try the best few: prune, heal a little, quantize, measure
    -> build the one that won, or refuse and say why

Works on top of plans, pruning, healing and backends; none of them knows of it.
"""
