// Curves as typed arrays that grow: one column of numbers for each key, all over the same versions.

export class Columns {
  constructor(keys) {
    this.length = 0;
    this.versions = new Float64Array(256);
    this.columns = new Map(keys.map((key) => [key, new Float64Array(256).fill(NaN)]));
  }

  /** Put the values of a version at its place; a version that is there already is written over. */
  put(version, values) {
    const at = this.#place(version);
    for (const [key, column] of this.columns) column[at] = values[key] ?? NaN;
  }

  get xs() {
    return this.versions.subarray(0, this.length);
  }

  get(key) {
    return this.columns.get(key).subarray(0, this.length);
  }

  /** The newest number of a key; NaN when there is none. */
  last(key) {
    const column = this.columns.get(key);
    for (let i = this.length - 1; i >= 0; i--) if (!Number.isNaN(column[i])) return column[i];
    return NaN;
  }

  #place(version) {
    let at = this.length;
    while (at > 0 && this.versions[at - 1] > version) at--;
    if (at > 0 && this.versions[at - 1] === version) return at - 1;
    if (this.length === this.versions.length) this.#grow();
    if (at < this.length) for (const column of [this.versions, ...this.columns.values()]) column.copyWithin(at + 1, at, this.length);
    this.versions[at] = version;
    this.length++;
    return at;
  }

  #grow() {
    const grown = (column) => {
      const longer = new Float64Array(2 * column.length).fill(NaN);
      longer.set(column);
      return longer;
    };
    this.versions = grown(this.versions);
    for (const [key, column] of this.columns) this.columns.set(key, grown(column));
  }
}
