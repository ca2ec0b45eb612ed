"""The structured matrix closest to a given one in Frobenius norm, from the description alone.

- *Terms of one factor* (dense, block-diagonal, DYAD): every entry of W is shared equally among the terms that have it.
- *Two factors* (low-rank, Kronecker, TT, Monarch, BTT, every einsum): for each value of the outer axes that both
  factors have, the other outer axes of the first against those of the second are a matrix whose rank the shared rank
  axes bound. The truncated SVD is optimal (Eckart and Young; for Kronecker Van Loan and Pitsianis, for Monarch
  arXiv 2204.00595).
- *More factors* are split off one after another in this way, which is exact if W has the structure. Otherwise, and for
  sums of such terms, alternating least squares improves the result: one factor at a time, until a sweep over all of
  them reduces the squared error by less than TOLERANCE, or for MAX_SWEEPS sweeps. Above 512 x 512 the limit is lower,
  down to MIN_SWEEPS from 2048 x 2048 on: that costs less than 0.1 % of the error of a chain, 1 to 2 % of BLAST's. Sums
  and BLAST can end in a local optimum, so random starts are tried as well up to 256 x 256.

With the second moment of the inputs, the error of the outputs is minimised instead of that of the weights: in closed
form for low rank, by L-BFGS for the others (weighted.py, descent.py).

nearest.py    project(), and terms of one factor
svd.py        two factors, and the start for more
truncate.py   closest matrices of a lower rank, for many matrices at once
als.py        alternating least squares
weighted.py   closest outputs: the start
descent.py    closest outputs: L-BFGS
unfolding.py  a matrix as a tensor of a term's axes
"""

from einlinear.ops.projection.nearest import project

__all__ = ["project"]
