"""The torch.fx pass: record a call as a graph, plan how each parameter is estimated, run the plan with stand-ins."""

from varify.graph.rewriting import rewrite

__all__ = ["rewrite"]
