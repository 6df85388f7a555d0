"""The torch.fx pass: a recorded call as a graph, what each parameter meets there, and the graph with posteriors."""

from varify.graph.rewriting import rewrite

__all__ = ["rewrite"]
