"""Models held to the numbers of their reference implementations."""
