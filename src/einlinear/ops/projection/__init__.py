"""The structured matrix closest to a given one in Frobenius norm, from the description alone.

Three ways, from the exact to the general:

- *Terms of one factor* (dense, block-diagonal, DYAD): every entry of W is shared equally among the terms that cover it.
- *Two factors* (low-rank, Kronecker, TT, Monarch, BTT, every einsum): for each value of the axes that both factors
  carry outside, a matrix of the axes of one against those of the other has the rank that the inner axes allow: its
  truncated SVD is the best there is (Eckart and Young; for Kronecker Van Loan and Pitsianis, for Monarch
  arXiv 2204.00595).
- *More factors* are split off one after another in this way, which is exact where W has the structure. What is not
  optimal then, and sums of such terms, is improved by alternating least squares: one factor at a time, until a sweep
  over all of them improves the squared error by less than TOLERANCE of it, or MAX_SWEEPS are done; fewer above 512 x
  512, and MIN_SWEEPS from 2048 x 2048 on, which costs less than 0.1 % of the error of a chain, 1 to 2 % of BLAST's.
  Sums and BLAST can end in a local optimum: up to 256 x 256 random starts are tried too.

Where the second moment of the inputs is known, the outputs can be made closest instead of the weights: a closed form
for low rank, the start of a descent for the others (weighted.py, descent.py).

project.py   the entry; terms of one factor
truncate.py  matrices of a lower rank, many at once
svd.py       two factors, and the start for more
als.py       alternating least squares: TOLERANCE, MAX_SWEEPS, MIN_SWEEPS
weighted.py  the same for outputs: where to start
descent.py   and how to go on from there
unfold.py    a matrix as a tensor of a term's axes

Seconds for a Gaussian float32 matrix on one core of an AMD EPYC:

    features                       1024      4096
    btt, monarch                    0.1    2 to 6
    low_rank, kronecker      0.4 to 0.6  20 to 32
    btt(cores=3)                    0.9        21
    blast, 16 blocks, rank n/16       8        84
"""

from einlinear.ops.projection.nearest import project

__all__ = ["project"]
